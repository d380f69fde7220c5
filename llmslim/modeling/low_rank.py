"""A projection as the product of two thin matrices.

    y = (x V) U,   V (I, R), U (R, O)

R (I + O) parameters instead of IO. Both are held by an ordinary `nn.Linear`: what quantises, adapts
or splits those reaches them. What it leaves out: any way of keeping directions outside the
R it has; a grouped block keeps all directions but mixes fewer.

Shapes: I = in_features, O = out_features, R = rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from .sizes import KeepRatio, OptionError, StaysDense, budget, check_rank
from .structured import Own, Products, StructuredLinear, empty_linear


class LowRank(StructuredLinear):
    """A rank-R projection, held as `down` and `up`, an `nn.Linear` from I to R and one from R to O.

    Example:
        >>> LowRank(64, 32, rank=4)(torch.ones(2, 64)).shape
        torch.Size([2, 32])
    """

    name: ClassVar[str] = "low_rank"
    input_linear: ClassVar[str] = "down"
    output_linear: ClassVar[str] = "up"

    @dataclass(frozen=True)
    class Options:
        """Options in a recipe: one of the two."""

        rank: Annotated[int | None, "Inner size R, at most the smaller of both sizes."] = None
        keep_ratio: KeepRatio = None

    @classmethod
    def resolve(cls, in_features: int, out_features: int, options: Options) -> Options:
        """Return the rank, given or from the share of weights to keep.

        Raises:
            StaysDense: if not even rank 1 fits the ratio.
            OptionError: if neither or both are given, or one is out of range.
        """
        rank, keep_ratio = options.rank, options.keep_ratio
        if rank is None and keep_ratio is not None:
            allowed = budget(in_features, out_features, keep_ratio)
            rank = min(allowed // (in_features + out_features), in_features, out_features)
            if rank < 1:
                raise StaysDense(f"not even rank 1 keeps it within {allowed:,} parameters")
        elif rank is None or keep_ratio is not None:
            raise OptionError("", "low_rank takes either rank or keep_ratio")
        return cls.Options(rank=check_rank(in_features, out_features, rank))

    def create(self, **kind: Any) -> None:
        """Make both factors."""
        self.rank: int = self.options.rank
        self.down = empty_linear(self.in_features, self.rank, **kind)
        self.up = empty_linear(self.rank, self.out_features, **kind)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both factors so that white input gives the output variance of `nn.Linear`, 1/3."""
        nn.init.normal_(self.down.weight, std=math.sqrt(1 / self.in_features))
        nn.init.normal_(self.up.weight, std=math.sqrt(1 / (3 * self.rank)))

    def product(self, x: Tensor) -> Tensor:
        """Return (x V) U."""
        return self.product_by(x, Own(self))

    def product_by(self, x: Tensor, by: Products) -> Tensor:
        """Return (x V) U, with the weights that `by` knows."""
        return by.linear(by.linear(x, "down"), "up")
