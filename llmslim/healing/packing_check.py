"""Test whether samples that are packed into one row would see each other in a model.

transformers separates packed samples by their position ids, in models that make their attention
mask from them. Many do not, and modules that carry a state from token to token (Mamba,
convolutions, linear attention) mix samples whatever the mask. So this is measured: the gradient of
the second sample's logits with respect to the first sample's embeddings must be exactly 0.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.healing.restoring import evaluating
from llmslim.storage import quiet

_TOKENS = 8  # of each of the two samples


def takes_position_ids(model: Any) -> bool:
    """Return whether a model takes the positions at which samples begin in a row."""
    return "position_ids" in inspect.signature(model.forward).parameters


def sees_neighbours(model: Any) -> bool:
    """Return whether samples in one row would see each other; true where the test fails.

    Args:
        model: a causal language model on any device; it is unchanged.
    """
    try:
        with quiet(), evaluating(model):
            gradient_LH = _gradient(model)
    except Exception:  # models raise anything
        return True
    return bool((gradient_LH[:_TOKENS] != 0).any())


def packing_notes(*, mixes: bool) -> list[str]:
    """Return a note for the report if samples in one row would see each other."""
    note = "Samples in one row would see each other in this architecture, so each has its own row."
    return [note] if mixes else []


def _gradient(model: Any) -> Tensor:
    """Return the gradient of a second sample's logits with respect to all embeddings, (L, H)."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1].clone()  # which some models write into

    embedding = model.get_input_embeddings()
    ids_NL = torch.arange(1, 1 + 2 * _TOKENS, device=model.device)[None]
    inputs = {"input_ids": ids_NL % embedding.weight.shape[0]}
    if takes_position_ids(model):
        inputs["position_ids"] = torch.arange(_TOKENS, device=model.device).repeat(2)[None]
    handle = embedding.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits_NLV = model(**inputs, use_cache=False).logits
            second = logits_NLV[:, _TOKENS + 1 :].float().square().sum()
            gradients = torch.autograd.grad(second, found, allow_unused=True)
    finally:
        handle.remove()
    (gradient,) = [one for one in gradients if one is not None]
    return gradient.reshape(2 * _TOKENS, -1)
