"""What a block is fitted to, and how a method is found by its name.

A method is one file in this folder with the method's name and in it

    FITS: bool                         whether it approximates the dense map at all
    def fit(block, target) -> None     fills the block's weights, in place

so a new method is one new file and nothing else. Biases are not fitted: the dense one is carried
over as it is.

Shapes: I = in_features, O = out_features.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llmslim.errors import RecipeError
from llmslim.modeling.structured import StructuredLinear


@dataclass(frozen=True)
class Target:
    """A dense map that a block is to stand in for."""

    weight_OI: Tensor
    """Weight as in `nn.Linear`, shape (O, I), float32."""
    bias_O: Tensor | None = None
    """Bias, shape (O,)."""
    seed: int = 0
    """Seed of whatever the method draws."""


class Method(NamedTuple):
    """A fitting method."""

    name: str
    fits: bool
    """Whether the block approximates the dense map, so that its error means something."""
    fit: Callable[[StructuredLinear, Target], None]


def method_names() -> list[str]:
    """Return the names of all methods, sorted."""
    here = Path(__file__)
    return sorted(p.stem for p in here.parent.glob("[a-z]*.py") if p.name != here.name)


def method_named(name: str) -> Method:
    """Return a method by its name.

    Raises:
        RecipeError: if there is none of that name.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name not in method_names():
        raise RecipeError(f"{name!r}; allowed {', '.join(method_names())}.")
    module = importlib.import_module(f"llmslim.init.{name}")
    return Method(name, module.FITS, module.fit)


@torch.no_grad()
def initialise(block: StructuredLinear, target: Target, method: Method) -> float | None:
    """Fill a block from a dense map, in place.

    Args:
        block: on any device, in any float type.
        target: the dense map.
        method: how.

    Returns:
        Relative squared error of the block's matrix against the dense one, ‖W - B‖² / ‖W‖²
        (the output error under white input); None where the method does not approximate.
    """
    method.fit(block, target)
    if target.bias_O is not None and block.bias is not None:
        block.bias.copy_(target.bias_O)
    if not method.fits:
        return None
    weight = target.weight_OI
    difference = block.to_dense().to(weight) - weight
    norm = weight.square().sum()
    return float(difference.square().sum() / norm) if norm > 0 else 0.0
