"""A block-diagonal map, a shuffle, another block-diagonal map: Monarch with an inner width.

    z[:, b] = x[:, b] @ F[b]          b = 0 .. B-1, F (B, I/B, m)
    z       = the (B, m) grid of inner channels, transposed
    y[:, c] = z[:, c] @ S[c]          c = 0 .. B-1, S (B, m, O/B)

The shuffle hands every output block about m/B channels of every input block, so as a matrix it is
a B x B grid of blocks, each of rank m/B: finer grained than one low-rank product of the same
m (I + O) parameters, with less of a rank everywhere. B = 1 is `low_rank`. Monarch matrices have
m = I/B; here m is free, as in Block Tensor-Train. What it leaves out: more than two factors.

Shapes: I = in_features, O = out_features, B = blocks, m = inner_features / B.
Source: Dao et al. 2022, "Monarch: Expressive Structured Matrices for Efficient and Accurate
Training"; Qiu et al. 2024, "Compute Better Spent: Replacing Dense Layers with Structured Matrices".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from .sizes import KeepRatio, OptionError, StaysDense, budget, check_groups, common_divisors
from .structured import Own, Products, StructuredLinear


class BlockShuffle(StructuredLinear):
    """Two block-diagonal maps with a shuffle between, `first` (B, I/B, m), `second` (B, m, O/B).

    Example:
        >>> block = BlockShuffle(64, 32, blocks=4, inner_features=32)
        >>> block(torch.ones(2, 64)).shape, sum(p.numel() for p in block.parameters())
        (torch.Size([2, 32]), 768)
    """

    name: ClassVar[str] = "block_shuffle"

    @dataclass(frozen=True)
    class Options:
        """Options in a recipe: inner_features or keep_ratio, and the blocks."""

        blocks: Annotated[
            int | None, "Number of blocks B; must divide both sizes. By default the fewest."
        ] = None
        inner_features: Annotated[
            int | None, "Channels between the two maps; a multiple of the blocks."
        ] = None
        keep_ratio: KeepRatio = None

    @classmethod
    def resolve(cls, in_features: int, out_features: int, options: Options) -> Options:
        """Return explicit blocks and inner width.

        At equal parameters two blocks fit the dense map better than four, and four better than
        eight: the fewest there can be are taken where none are given.

        Raises:
            StaysDense: if the sizes have no common divisor, or no inner width fits the ratio.
            OptionError: if neither or both of inner_features and keep_ratio are given, or one is
                wrong.
        """
        blocks, inner, keep_ratio = options.blocks, options.inner_features, options.keep_ratio
        if (inner is None) == (keep_ratio is None):
            raise OptionError("", "block_shuffle takes either inner_features or keep_ratio")
        if blocks is None:
            divisors = common_divisors(in_features, out_features)
            if len(divisors) == 1:
                raise StaysDense(f"no common divisor of {in_features} and {out_features} above 1")
            blocks = divisors[1]
        check_groups(in_features, out_features, blocks, "blocks")
        if inner is None:
            assert keep_ratio is not None
            allowed = budget(in_features, out_features, keep_ratio)
            inner = allowed // (in_features + out_features) * blocks
            if inner < 1:
                raise StaysDense(f"no inner width keeps it within {allowed:,} parameters")
        largest = blocks * min(in_features, out_features)
        if inner % blocks or not blocks <= inner <= largest:
            raise OptionError(
                "inner_features",
                f"inner_features {inner}; allowed multiples of {blocks} up to {largest}",
            )
        return cls.Options(blocks=blocks, inner_features=inner)

    def create(self, **kind: Any) -> None:
        """Make both maps."""
        self.blocks: int = self.options.blocks
        self.inner_features: int = self.options.inner_features
        m = self.inner_features // self.blocks
        i, o = self.in_features // self.blocks, self.out_features // self.blocks
        self.first = nn.Parameter(torch.empty(self.blocks, i, m, **kind))
        self.second = nn.Parameter(torch.empty(self.blocks, m, o, **kind))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both factors so that white input gives the output variance of `nn.Linear`, 1/3."""
        nn.init.normal_(self.first, std=math.sqrt(1 / self.first.shape[1]))
        nn.init.normal_(self.second, std=math.sqrt(1 / (3 * self.second.shape[1])))

    def product(self, x: Tensor) -> Tensor:
        """Return the block's output for x (..., I), bias not added."""
        y = self.product_by(x.reshape(-1, self.in_features), Own(self))
        return y.reshape(*x.shape[:-1], self.out_features)

    def product_by(self, x_NI: Tensor, by: Products) -> Tensor:
        """Return the block's output for rows, with the weights that `by` knows."""
        N, B, m = x_NI.shape[0], self.blocks, self.inner_features // self.blocks
        z = by.bmm(x_NI.reshape(N, B, self.in_features // B).transpose(0, 1), "first")  # (B, N, m)
        z = z.permute(1, 2, 0).reshape(N, B, m).transpose(0, 1)  # shuffled, (B, N, m)
        return by.bmm(z, "second").transpose(0, 1).reshape(N, self.out_features)
