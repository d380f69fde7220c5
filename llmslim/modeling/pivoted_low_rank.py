"""A rank-R projection without the redundant numbers of two thin matrices.

A rank-R matrix has R rows that span all others. Those R outputs, the pivots, are computed densely;
every other output is a combination of them:

    z = x P,   y = [z, z C] put in order        P (I, R), C (R, O - R), an `nn.Linear` each

R (I + O - R) parameters for the same function that `low_rank` holds in R (I + O): its two factors
can be multiplied by any (R, R) matrix and its inverse, and those R² numbers are what is saved. So
the same budget affords a higher rank. Which outputs are pivots is an index buffer, fitted and never
trained. What it leaves out: choosing the pivots again while training.

Shapes: I = in_features, O = out_features, R = rank.
Source: Zhao et al. 2025, "Pivoting Factorization"; the interpolative decomposition of numerical
linear algebra.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from .sizes import KeepRatio, OptionError, StaysDense, budget, check_rank
from .structured import Own, Products, StructuredLinear, empty_linear


class PivotedLowRank(StructuredLinear):
    """A rank-R projection, held as `pivot`, `rest` and the index buffer `order`.

    `pivot` is an `nn.Linear` from I to R, `rest` one from R to O - R.

    Example:
        >>> block = PivotedLowRank(64, 32, rank=4)
        >>> block(torch.ones(2, 64)).shape, sum(p.numel() for p in block.parameters())
        (torch.Size([2, 32]), 368)
    """

    name: ClassVar[str] = "pivoted_low_rank"
    buffer_names: ClassVar[tuple[str, ...]] = ("order",)
    input_linear: ClassVar[str] = "pivot"

    @dataclass(frozen=True)
    class Options:
        """Options in a recipe: one of the two."""

        rank: Annotated[int | None, "Inner size R, below the smaller of both sizes."] = None
        keep_ratio: KeepRatio = None

    order: Tensor
    """Where each output stands in [z, z C], shape (O,), int64."""

    @classmethod
    def resolve(cls, in_features: int, out_features: int, options: Options) -> Options:
        """Return the rank, given or from the share of weights to keep.

        Raises:
            StaysDense: if not even rank 1 fits the ratio, or full rank does.
            OptionError: if neither or both are given, or one is out of range.
        """
        rank, keep_ratio = options.rank, options.keep_ratio
        if rank is None and keep_ratio is not None:
            allowed = budget(in_features, out_features, keep_ratio)
            total = in_features + out_features
            # The smaller root of R (I + O - R) = allowed, rounded down without rounding errors.
            root = total * total - 4 * allowed
            above = math.isqrt(root) + (math.isqrt(root) ** 2 < root)
            rank = (total - above) // 2
            if rank < 1:
                raise StaysDense(f"not even rank 1 keeps it within {allowed:,} parameters")
        elif rank is None or keep_ratio is not None:
            raise OptionError("", "pivoted_low_rank takes either rank or keep_ratio")
        if check_rank(in_features, out_features, rank) == min(in_features, out_features):
            raise StaysDense("full rank has the dense projection's parameters")
        return cls.Options(rank=rank)

    @classmethod
    def for_auto(cls, in_features: int, out_features: int, keep_ratio: float) -> dict[str, Any]:
        """Be tried in every size."""
        del in_features, out_features
        return {"keep_ratio": keep_ratio}

    def create(self, **kind: Any) -> None:
        """Make both parts and the order."""
        self.rank: int = check_rank(self.in_features, self.out_features, self.options.rank)
        others = self.out_features - self.rank
        self.pivot = empty_linear(self.in_features, self.rank, **kind)
        self.rest = empty_linear(self.rank, others, **kind)
        self.register_buffer("order", torch.arange(self.out_features, device=kind["device"]))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both parts so that white input gives the output variance of `nn.Linear`, 1/3."""
        nn.init.normal_(self.pivot.weight, std=math.sqrt(1 / (3 * self.in_features)))
        nn.init.normal_(self.rest.weight, std=math.sqrt(1 / self.rank))
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Make the first R outputs the pivots, in place."""
        self.order.copy_(torch.arange(self.out_features))

    def product(self, x: Tensor) -> Tensor:
        """Return [x P, x P C], each output put in its place."""
        return self.product_by(x, Own(self))

    def product_by(self, x: Tensor, by: Products) -> Tensor:
        """Return the same with the weights that `by` knows."""
        z = by.linear(x, "pivot")
        return by.take(torch.cat((z, by.linear(z, "rest")), dim=-1), "order")
