"""A grouped block and a low-rank product side by side, added.

    y = io(x) + (x V) U               io as in grouped_pointwise, V (I, R), U (R, O)

2IO/G + R(I + O) parameters. The product carries the directions that all outputs share; the grouped
part keeps detail of full rank that no thin product has. Most of a budget belongs to the product:
on a real model's projections the sum is better than the product alone only where the grouped part
is thin, about a twelfth, and its channel order learned. What it leaves out: the pivoted form of
the product.

Shapes: I = in_features, O = out_features, G = groups, R = rank.
Source: the sum of this folder's grouped_pointwise and low_rank; for the idea of low rank plus a
structured rest, Chandrasekaran et al. 2011.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from .grouped_pointwise import GroupedPointwise
from .low_rank import LowRank
from .sizes import (
    KeepRatio,
    OptionError,
    StaysDense,
    budget,
    check_groups,
    check_rank,
    common_divisors,
    exact_ratio,
)
from .structured import Products, StructuredLinear

_GROUPED_SHARE = 12
"""The grouped part gets at most this fraction of the budget: 1 / 12."""


class GroupedLowRank(StructuredLinear):
    """The sum of `grouped`, a GroupedPointwise of variant io, and `low_rank`, a LowRank.

    Example:
        >>> block = GroupedLowRank(64, 32, groups=8, rank=4)
        >>> block(torch.ones(2, 64)).shape, sum(p.numel() for p in block.parameters())
        (torch.Size([2, 32]), 896)
    """

    name: ClassVar[str] = "grouped_low_rank"
    buffer_names: ClassVar[tuple[str, ...]] = ("grouped.order",)

    @dataclass(frozen=True)
    class Options:
        """Options in a recipe: groups and rank, or keep_ratio, perhaps with groups."""

        groups: Annotated[
            int | None,
            "Number of groups G; must divide both sizes. By default the fewest that leave the "
            "grouped part a twelfth of the budget.",
        ] = None
        rank: Annotated[int | None, "Inner size R of the product."] = None
        keep_ratio: KeepRatio = None
        channel_order: Annotated[
            Literal["fixed", "learned"],
            "`learned` also fits which input channels each group sees.",
        ] = "fixed"

    @classmethod
    def resolve(cls, in_features: int, out_features: int, options: Options) -> Options:
        """Return explicit groups, rank and channel order.

        Raises:
            StaysDense: if these sizes have no common divisor, or no rank fits beside the groups.
            OptionError: if the size is given twice or not at all, or one option is wrong.
        """
        groups, rank, keep_ratio = options.groups, options.rank, options.keep_ratio
        if (rank is None) == (keep_ratio is None) or (rank is not None and groups is None):
            raise OptionError("", "grouped_low_rank takes either groups and rank, or keep_ratio")
        if groups is None:
            assert keep_ratio is not None
            divisors = common_divisors(in_features, out_features)
            share = exact_ratio(keep_ratio) / _GROUPED_SHARE
            groups = next((d for d in divisors if share * d >= 2), divisors[-1])
        check_groups(in_features, out_features, groups)
        if groups == 1:
            raise StaysDense("one group is the dense projection")
        if rank is None:
            assert keep_ratio is not None
            allowed = budget(in_features, out_features, keep_ratio)
            left = allowed - 2 * in_features * out_features // groups
            rank = min(left // (in_features + out_features), in_features, out_features)
            if rank < 1:
                raise StaysDense(
                    f"no rank beside {groups} groups keeps it within {allowed:,} parameters"
                )
        return replace(
            options,
            groups=groups,
            rank=check_rank(in_features, out_features, rank),
            keep_ratio=None,
        )

    def create(self, **kind: Any) -> None:
        """Make both parts."""
        sizes, options = (self.in_features, self.out_features), self.options
        self.grouped = GroupedPointwise(
            *sizes, groups=options.groups, channel_order=options.channel_order, **kind
        )
        self.low_rank = LowRank(*sizes, rank=options.rank, **kind)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both parts, each with half the output variance of `nn.Linear`, 1/3."""
        self.grouped.reset_parameters()
        self.grouped.weight.mul_(math.sqrt(0.5))
        self.low_rank.reset_parameters()
        self.low_rank.up.weight.mul_(math.sqrt(0.5))

    def reset_buffers(self) -> None:
        """Put the grouped part's channels in their own order, in place."""
        self.grouped.reset_buffers()

    def product(self, x: Tensor) -> Tensor:
        """Return the sum of both products."""
        # Called as modules: what other libraries add to one takes part.
        y: Tensor = self.grouped(x) + self.low_rank(x)
        return y

    def product_by(self, x_NI: Tensor, by: Products) -> Tensor:
        """Return the sum of both products, with the weights that `by` knows."""
        grouped = self.grouped.product_by(x_NI, by.of("grouped"))
        return grouped + self.low_rank.product_by(x_NI, by.of("low_rank"))
