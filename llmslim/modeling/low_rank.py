"""A projection as the product of two thin matrices.

    y = (x V) U,   V (I, R), U (R, O)

r(I + O) parameters instead of IO. What it leaves out: any way of keeping directions outside the
R it has; a grouped block keeps all directions but mixes fewer.

Shapes: I = in_features, O = out_features, R = rank.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .sizes import StaysDense, budget
from .structured import StructuredLinear


class LowRank(StructuredLinear):
    """A rank-R projection, held as `down` (I, R) and `up` (R, O).

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
        >>> LowRank(64, 32, rank=4)(torch.ones(2, 64)).shape
        torch.Size([2, 32])
    """

    name: ClassVar[str] = "low_rank"
    option_names: ClassVar[tuple[str, ...]] = ("rank", "keep_ratio")

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
        largest = min(in_features, out_features)
        if not 1 <= rank <= largest:
            raise ValueError(f"rank {rank}; allowed 1 to {largest}")
        self.rank = rank
        self.down = nn.Parameter(torch.empty(in_features, rank, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(rank, out_features, device=device, dtype=dtype))
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
            StaysDense: if not even rank 1 fits the ratio.
            ValueError: if neither or both are given, or the rank is out of range.
        """
        if (rank is None) == (keep_ratio is None):
            raise ValueError("low_rank takes either rank or keep_ratio")
        if rank is None:
            assert keep_ratio is not None
            allowed = budget(in_features, out_features, keep_ratio)
            rank = min(allowed // (in_features + out_features), in_features, out_features)
            if rank < 1:
                raise StaysDense(f"not even rank 1 keeps it within {allowed:,} parameters")
        elif not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank {rank}; allowed 1 to {min(in_features, out_features)}")
        return {"rank": rank}

    @classmethod
    def count_weights(  # type: ignore[override]
        cls, in_features: int, out_features: int, *, rank: int
    ) -> int:
        """Return R (I + O)."""
        return rank * (in_features + out_features)

    def options(self) -> dict[str, Any]:
        """Return the rank."""
        return {"rank": self.rank}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both factors so that white input gives the output variance of `nn.Linear`, 1/3."""
        nn.init.normal_(self.down, std=math.sqrt(1 / self.in_features))
        nn.init.normal_(self.up, std=math.sqrt(1 / (3 * self.rank)))

    def product(self, x: Tensor) -> Tensor:
        """Return (x V) U."""
        return x @ self.down @ self.up
