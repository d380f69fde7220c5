"""Fresh weights at the scale of the source report's code, for training runs that repeat it.

Its grouped layer holds a (G, i, o) tensor and calls Kaiming-uniform on it, which reads a 3-D shape
as a convolution's and takes i*o for the fan-in. The bound is then 1/sqrt(i o) where `nn.Linear`
would have 1/sqrt(i): for 256 channels into 768 a standard deviation of 0.0013 instead of 0.036.

Shapes: G = groups, i = I/G, o = O/G.
Source: the kphi-3 report's modelling code, class GroupedLinearFast.
"""

from __future__ import annotations

import math

import torch

from llmslim.errors import RecipeError
from llmslim.init.target import Target
from llmslim.modeling.grouped_pointwise import GroupedPointwise
from llmslim.modeling.structured import StructuredLinear

FITS = False


def fit(block: StructuredLinear, target: Target) -> None:
    """Draw the block's weights at the published scale, in place.

    Args:
        block: a grouped pointwise block.
        target: only its seed is used.

    Raises:
        RecipeError: if the block is of another structure.
    """
    if not isinstance(block, GroupedPointwise):
        raise RecipeError(
            f"init: random_published with structure {block.name}; it is the report's scale of "
            "grouped_pointwise. Use random."
        )
    generator = torch.Generator().manual_seed(target.seed)
    o = block.out_features // block.groups
    fans = [(block.weight, block.in_features // block.groups)]
    if block.second is not None:
        fans.append((block.second, o))
    for weight, i in fans:
        bound = 1 / math.sqrt(i * o)
        drawn = torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
        weight.copy_(drawn)
