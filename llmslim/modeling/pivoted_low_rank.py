"""A rank-R projection without the redundant numbers of two thin matrices.

A rank-R matrix has R rows that span all others. Those R outputs, the pivots, are computed densely;
every other output is a combination of them:

    z = x P,   y = [z, z C] put in order        P (I, R), C (R, O - R)

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
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .sizes import StaysDense, budget
from .structured import StructuredLinear


class PivotedLowRank(StructuredLinear):
    """A rank-R projection, held as `pivot` (I, R), `rest` (R, O - R) and the index buffer `order`.

    Args:
        in_features: input channels I.
        out_features: output channels O.
        rank: R, at least 1 and at most min(I, O).
        bias: whether a bias of shape (O,) is added.
        device: where the parameters live.
        dtype: the parameters' type.

    Raises:
        ValueError: if the rank is out of range.

    Example:
        >>> block = PivotedLowRank(64, 32, rank=4)
        >>> block(torch.ones(2, 64)).shape, sum(p.numel() for p in block.parameters())
        (torch.Size([2, 32]), 368)
    """

    name: ClassVar[str] = "pivoted_low_rank"
    option_names: ClassVar[tuple[str, ...]] = ("rank", "keep_ratio")
    buffer_names: ClassVar[tuple[str, ...]] = ("order",)

    order: Tensor
    """Where each output stands in [z, z C], shape (O,), int64."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.rank = _check_rank(in_features, out_features, rank)
        others = out_features - rank
        self.pivot = nn.Parameter(torch.empty(in_features, rank, device=device, dtype=dtype))
        self.rest = nn.Parameter(torch.empty(rank, others, device=device, dtype=dtype))
        self.register_buffer("order", torch.arange(out_features, device=device))
        self.reset_parameters()

    @classmethod
    def resolve(  # type: ignore[override]  # each structure names its own options
        cls,
        in_features: int,
        out_features: int,
        *,
        rank: int | None = None,
        keep_ratio: float | None = None,
    ) -> dict[str, Any]:
        """Return `{"rank": R}` from an explicit rank or from the share of weights to keep.

        Raises:
            StaysDense: if not even rank 1 fits the ratio, or full rank does.
            ValueError: if neither or both are given, or the rank is out of range.
        """
        if (rank is None) == (keep_ratio is None):
            raise ValueError("pivoted_low_rank takes either rank or keep_ratio")
        largest = min(in_features, out_features)
        if rank is None:
            assert keep_ratio is not None
            allowed = budget(in_features, out_features, keep_ratio)
            total = in_features + out_features
            # The smaller root of R (I + O - R) = allowed, rounded down without rounding errors.
            root = total * total - 4 * allowed
            above = math.isqrt(root) + (math.isqrt(root) ** 2 < root)
            rank = (total - above) // 2
            if rank < 1:
                raise StaysDense(f"not even rank 1 keeps it within {allowed:,} parameters")
        if _check_rank(in_features, out_features, rank) == largest:
            raise StaysDense("full rank has the dense projection's parameters")
        return {"rank": rank}

    @classmethod
    def count_weights(  # type: ignore[override]
        cls, in_features: int, out_features: int, *, rank: int
    ) -> int:
        """Return R (I + O - R)."""
        return rank * (in_features + out_features - rank)

    def options(self) -> dict[str, Any]:
        """Return the rank."""
        return {"rank": self.rank}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both parts so that white input gives the output variance of `nn.Linear`, 1/3."""
        nn.init.normal_(self.pivot, std=math.sqrt(1 / (3 * self.in_features)))
        nn.init.normal_(self.rest, std=math.sqrt(1 / self.rank))
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Make the first R outputs the pivots, in place."""
        self.order.copy_(torch.arange(self.out_features))

    def product(self, x: Tensor) -> Tensor:
        """Return [x P, x P C], each output put in its place."""
        z = x @ self.pivot
        return torch.cat((z, z @ self.rest), dim=-1).index_select(-1, self.order)


def _check_rank(in_features: int, out_features: int, rank: int) -> int:
    largest = min(in_features, out_features)
    if not 1 <= rank <= largest:
        raise ValueError(f"rank {rank}; allowed 1 to {largest}")
    return rank
