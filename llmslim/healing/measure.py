"""The loss on text that is not trained on: what every decision of a healing stands on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llmslim.healing.objectives.cross_entropy import summed_cross_entropy
from llmslim.healing.restoring import evaluating

Collate = Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]


@torch.no_grad()
def held_out_loss(
    model: Any,
    rows: Dataset[dict[str, Tensor]],
    collate: Collate,
    *,
    micro_batch: int,
    accelerator: Any,
    position_ids: bool = True,
) -> float:
    """Return the mean of -log p(next token) over all predicted tokens, in nats.

    Every process takes its share of the rows, and all return the same number. All make as many
    calls as each other, as models that are spread over processes need.

    Args:
        model: any causal language model, perhaps wrapped.
        rows: what to predict.
        collate: makes a batch of some rows.
        micro_batch: rows of one call.
        accelerator: accelerate's, for the number of processes and to add up over them.
        position_ids: whether the model takes these.
    """
    total = torch.zeros(2, dtype=torch.float64)
    count = len(rows)  # type: ignore[arg-type]
    stride = micro_batch * accelerator.num_processes
    with evaluating(model):
        for start in range(0, count, stride):
            first = start + accelerator.process_index * micro_batch
            mine = range(first, min(first + micro_batch, count))
            batch = collate([rows[index] for index in mine or [0]])
            labels_NL = batch.pop("labels").to(accelerator.device)
            if not mine:  # a call like the others', that counts nothing
                labels_NL.fill_(-100)
            if not position_ids:
                batch.pop("position_ids", None)
            inputs = {key: value.to(accelerator.device) for key, value in batch.items()}
            logits_NLV = model(**inputs, use_cache=False).logits
            targets_NL = torch.nn.functional.pad(labels_NL[:, 1:], (0, 1), value=-100)
            total[0] += float(summed_cross_entropy(logits_NLV, targets_NL))
            total[1] += int((targets_NL != -100).sum())
    # Some devices have no float64; what is lost is below the eighth digit.
    total = accelerator.reduce(total.float().to(accelerator.device), "sum").cpu()
    return float(total[0] / total[1].clamp(min=1))
