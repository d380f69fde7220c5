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
from typing import Any, ClassVar

import torch
from torch import Tensor

from .grouped_pointwise import GroupedPointwise
from .low_rank import LowRank
from .sizes import StaysDense, budget, check_groups, common_divisors, exact_ratio
from .structured import StructuredLinear

_GROUPED_SHARE = 12
"""The grouped part gets at most one part in so many of the budget."""


class GroupedLowRank(StructuredLinear):
    """The sum of `grouped`, a GroupedPointwise of variant io, and `low_rank`, a LowRank.

    Args:
        in_features: input channels I.
        out_features: output channels O.
        groups: G; must divide I and O.
        rank: R, at least 1 and at most min(I, O).
        channel_order: `fixed` or `learned`, of the grouped part.
        bias: whether a bias of shape (O,) is added.
        device: where the parameters live.
        dtype: the parameters' type.

    Raises:
        ValueError: if the groups do not divide both sizes, or the rank is out of range.

    Example:
        >>> block = GroupedLowRank(64, 32, groups=8, rank=4)
        >>> block(torch.ones(2, 64)).shape, sum(p.numel() for p in block.parameters())
        (torch.Size([2, 32]), 896)
    """

    name: ClassVar[str] = "grouped_low_rank"
    option_names: ClassVar[tuple[str, ...]] = ("groups", "rank", "keep_ratio", "channel_order")
    buffer_names: ClassVar[tuple[str, ...]] = ("grouped.order",)
    parts: ClassVar[tuple[str, ...]] = ("grouped_pointwise", "low_rank")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        groups: int,
        rank: int,
        channel_order: str = "fixed",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.grouped = GroupedPointwise(
            in_features,
            out_features,
            groups=groups,
            channel_order=channel_order,
            device=device,
            dtype=dtype,
        )
        self.low_rank = LowRank(in_features, out_features, rank=rank, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def resolve(  # type: ignore[override]  # each structure names its own options
        cls,
        in_features: int,
        out_features: int,
        *,
        groups: int | None = None,
        rank: int | None = None,
        keep_ratio: float | None = None,
        channel_order: str = "fixed",
    ) -> dict[str, Any]:
        """Return explicit groups, rank and channel order.

        Args:
            in_features: input channels I.
            out_features: output channels O.
            groups: G; by default the fewest that leave the grouped part a twelfth of the budget.
            rank: R, together with groups and in place of keep_ratio.
            keep_ratio: share of the dense weights to keep; picks the largest rank within it.
            channel_order: `fixed` or `learned`.

        Raises:
            StaysDense: if these sizes have no common divisor, or no rank fits beside the groups.
            ValueError: if the size is said twice or not at all, or one option is wrong.
        """
        if (rank is None) == (keep_ratio is None) or (rank is not None and groups is None):
            raise ValueError("grouped_low_rank takes either groups and rank, or keep_ratio")
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
            left = allowed - GroupedPointwise.count_weights(
                in_features, out_features, groups=groups
            )
            rank = min(left // (in_features + out_features), in_features, out_features)
            if rank < 1:
                raise StaysDense(
                    f"no rank beside {groups} groups keeps it within {allowed:,} parameters"
                )
        resolved = GroupedPointwise.resolve(
            in_features, out_features, groups=groups, channel_order=channel_order
        )
        del resolved["variant"]
        return {**resolved, **LowRank.resolve(in_features, out_features, rank=rank)}

    @classmethod
    def count_weights(  # type: ignore[override]
        cls,
        in_features: int,
        out_features: int,
        *,
        groups: int,
        rank: int,
        channel_order: str = "fixed",  # noqa: ARG003  (an index, not a weight)
    ) -> int:
        """Return 2IO/G + R (I + O)."""
        grouped = GroupedPointwise.count_weights(in_features, out_features, groups=groups)
        return grouped + LowRank.count_weights(in_features, out_features, rank=rank)

    def options(self) -> dict[str, Any]:
        """Return groups and rank, and the channel order where it is learned."""
        options = {**self.grouped.options(), **self.low_rank.options()}
        del options["variant"]
        return options

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both parts, each with half the output variance of `nn.Linear`, 1/3."""
        self.grouped.reset_parameters()
        self.grouped.weight.mul_(math.sqrt(0.5))
        self.low_rank.reset_parameters()
        self.low_rank.up.mul_(math.sqrt(0.5))

    def reset_buffers(self) -> None:
        """Put the grouped part's channels in their own order, in place."""
        self.grouped.reset_buffers()

    def product(self, x: Tensor) -> Tensor:
        """Return the sum of both products."""
        grouped: Tensor = self.grouped.product(x)
        return grouped + self.low_rank.product(x)
