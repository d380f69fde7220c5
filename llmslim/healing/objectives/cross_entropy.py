"""Predict the next token of the text."""

from __future__ import annotations

from torch import Tensor

from llmslim.anatomy.predictions import summed_cross_entropy

from ._step import Step

NEEDS_TEACHER = False


def loss(step: Step) -> Tensor:
    """Return the sum of -log p(next token)."""
    logits_NLV: Tensor = step.forward().logits
    return summed_cross_entropy(logits_NLV, step.targets_NL)
