"""Predict the next token of the text."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from llmslim.anatomy.predictions import sum_over_tokens

from ._step import Step

NEEDS_TEACHER = False


def loss(step: Step) -> Tensor:
    """Return the sum of -log p(next token)."""
    logits_NLV: Tensor = step.forward().logits
    return summed_cross_entropy(logits_NLV, step.targets_NL)


def summed_cross_entropy(logits_NLV: Tensor, targets_NL: Tensor) -> Tensor:
    """Return the sum of -log p(target), in nats.

    Args:
        logits_NLV: logits, (N, L, V), in any float type.
        targets_NL: the token that each should predict, -100 for none.
    """
    targets_T = targets_NL.reshape(-1)
    return sum_over_tokens(
        logits_NLV.reshape(len(targets_T), -1),
        lambda logits_CV, where: functional.cross_entropy(
            logits_CV, targets_T[where], ignore_index=-100, reduction="sum"
        ),
    )
