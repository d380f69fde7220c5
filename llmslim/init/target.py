"""What a block is fitted to, and how a method is found by its name.

A method is one file in this folder with the method's name and in it

    FITS: bool                         whether it approximates the dense map at all
    NEEDS_GRAM: bool = False           whether it cannot do without calibration
    def fit(block, target) -> None     fills the block's weights, in place

so a new method is one new file and nothing else, or one in another package (`llmslim.plugins`);
helpers' names begin with `_`. Biases are not fitted: the dense one is carried over as it is.

Shapes: I = in_features, O = out_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmslim.errors import RecipeError
from llmslim.init._gram import relative_error
from llmslim.modeling.structured import StructuredLinear
from llmslim.plugins import INITS, Method

_ROWS = 128
"""Rows of a matrix that are compared together."""


@dataclass(frozen=True)
class Target:
    """A dense map that a block is to stand in for."""

    weight_OI: Tensor
    """Weight as in `nn.Linear`, shape (O, I), float32; float64 where the model is."""
    bias_O: Tensor | None = None
    """Bias, shape (O,)."""
    seed: int = 0
    """Seed of whatever the method draws."""
    gram_II: Tensor | None = None
    """E[x xᵀ] of the inputs x the block will see, (I, I), float64; None without calibration."""


def method_names() -> list[str]:
    """Return the names of all methods, sorted."""
    return INITS.names()


def method_named(name: str) -> Method:
    """Return a method by its name.

    Raises:
        RecipeError: if there is none of that name.
    """
    method = INITS.get(name)
    if method is None:
        raise RecipeError(f"{name!r}; allowed {', '.join(method_names())}.")
    return method


@torch.no_grad()
def initialise(block: StructuredLinear, target: Target, method: Method) -> float | None:
    """Fill a block from a dense map, in place.

    Args:
        block: on any device, in any float type.
        target: the dense map.
        method: how.

    Returns:
        Relative squared error of the block's outputs against the dense ones, on the calibration
        tokens, or under white input (‖W - B‖² / ‖W‖²) where the target has no Gram matrix; None
        where the method does not approximate.
    """
    block.reset_buffers()  # made without memory, they hold anything
    method.fit(block, target)
    if target.bias_O is not None and block.bias is not None:
        block.bias.copy_(target.bias_O)
    if not method.fits:
        return None
    weight = target.weight_OI
    if target.gram_II is not None:
        dense = block.to_dense().to(weight.device)
        return relative_error(dense, weight, target.gram_II.to(weight.device))
    # A few rows at a time: whole matrices in float32 would take memory, and time to get it.
    lost = norm = 0.0
    for rows, wanted in zip(block.to_dense().split(_ROWS), weight.split(_ROWS), strict=True):
        lost += _power(rows.to(wanted) - wanted)
        norm += _power(wanted)
    return lost / norm if norm > 0 else 0.0


def _power(rows: Tensor) -> float:
    # A copy lies at a round address: sums of what is mapped from a file depend on where it lies.
    flat = rows.clone().reshape(-1)
    return float(flat @ flat)
