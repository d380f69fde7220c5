"""Score a model on text, beside the dense model if there is one.

Shapes: N windows of L tokens, T = tokens, V = size of the vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from llmslim.anatomy.predictions import divergence, summed_cross_entropy, tokens_at_once
from llmslim.errors import DataError
from llmslim.progress import Progress, quietly
from llmslim.report.scores import Estimate, TextScores


@torch.no_grad()
def score_text(
    model: Any,
    ids_NL: Tensor,
    *,
    name: str,
    dense: Any = None,
    progress: Progress = quietly,
) -> TextScores:
    """Return a model's scores on windows of text.

    Args:
        model: a causal language model in evaluation mode.
        ids_NL: windows of token ids; the first token of each is not predicted.
        name: of the text.
        dense: the model that it is compared with, if any; on the same device.
        progress: called with windows done, windows in all, and the name of the text.

    Raises:
        DataError: if the models do not have the same vocabulary.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for number, ids_L in enumerate(ids_NL.to(model.device)):
        ours_LV = model(ids_L[None], use_cache=False).logits[0]
        found["loss"].append(_loss(ours_LV, ids_L))
        if dense is not None:
            theirs_LV = dense(ids_L[None], use_cache=False).logits[0]
            if theirs_LV.shape != ours_LV.shape:
                raise DataError(
                    f"against: predicts {theirs_LV.shape[-1]:,} tokens and the model "
                    f"{ours_LV.shape[-1]:,}; both need one vocabulary. Name the dense model that "
                    "it was made from."
                )
            found["dense_loss"].append(_loss(theirs_LV, ids_L))
            distance, same = _compared(ours_LV, theirs_LV)
            found["divergence"].append(distance)
            found["agreement"].append(same)
        progress(number + 1, len(ids_NL), name)
    scores = {key: Estimate.of(values) for key, values in found.items()}
    return TextScores(name, len(ids_NL), ids_NL.shape[1], **scores)


def _loss(logits_LV: Tensor, ids_L: Tensor) -> float:
    """Return the mean of -log p(next token) of one window."""
    return float(summed_cross_entropy(logits_LV[:-1], ids_L[1:])) / (len(ids_L) - 1)


def _compared(ours_LV: Tensor, theirs_LV: Tensor) -> tuple[float, float]:
    """Return the mean divergence from the other predictions, and the share of equal top tokens."""
    total, same, chunk = 0.0, 0, tokens_at_once(ours_LV)
    for ours_TV, theirs_TV in zip(ours_LV.split(chunk), theirs_LV.split(chunk), strict=True):
        log_p_TV, log_q_TV = (one.float().log_softmax(-1) for one in (theirs_TV, ours_TV))
        total += float(divergence(log_p_TV, log_q_TV).sum())
        same += int((ours_TV.argmax(-1) == theirs_TV.argmax(-1)).sum())
    return total / len(ours_LV), same / len(ours_LV)
