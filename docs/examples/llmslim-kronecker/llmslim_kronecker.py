"""A structure of its own package: a projection as a sum of Kronecker products.

    W = A_1 ⊗ B_1 + ... + A_K ⊗ B_K       A_k (a, a), B_k (O/a, I/a)

K (a² + IO/a²) parameters. The input is read as a grid (a, I/a): B mixes along its rows, A along its
columns. As a matrix it is an (a, a) grid of blocks, each a combination of the same K blocks.

The file imports torch, the standard library and `llmslim.modeling` only, so it travels inside
checkpoints, as the built-in structures do.

Shapes: I = in_features, O = out_features, a = side, K = terms, i = I/a, o = O/a, N = rows of x.
Source: Van Loan and Pitsianis 1993, "Approximation with Kronecker Products".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from llmslim.modeling.sizes import OptionError, StaysDense, check_groups, common_divisors
from llmslim.modeling.structured import StructuredLinear


class Kronecker(StructuredLinear):
    """A sum of K Kronecker products, held as `outer` (K, a, a) and `inner` (K, i, o)."""

    name: ClassVar[str] = "kronecker"

    @dataclass(frozen=True)
    class Options:
        """What a recipe may say of it."""

        side: Annotated[int, "Side a of the outer factors; must divide both sizes."]
        terms: Annotated[int, "Number K of products that are added."] = 1

    options: Options

    @classmethod
    def resolve(cls, in_features: int, out_features: int, options: Options) -> Options:
        """Check the options; they are explicit already.

        Raises:
            StaysDense: if nothing would be gained.
            OptionError: if the side does not divide both sizes, or there is no term.
        """
        if check_groups(in_features, out_features, options.side, "side") == 1:
            raise StaysDense("with a side of 1 the inner factor is the dense projection")
        if options.terms < 1:
            raise OptionError("terms", f"terms {options.terms}; allowed 1 or more")
        return options

    @classmethod
    def for_auto(
        cls, in_features: int, out_features: int, keep_ratio: float
    ) -> dict[str, Any] | None:
        """Be tried with the smallest side, and as many terms as the share allows."""
        sides = common_divisors(in_features, out_features)[1:]
        dense = in_features * out_features
        terms = int(keep_ratio * dense / (sides[0] ** 2 + dense / sides[0] ** 2)) if sides else 0
        return {"side": sides[0], "terms": terms} if terms else None

    def create(self, **kind: Any) -> None:
        """Make both factors of every term."""
        a, terms = self.options.side, self.options.terms
        i, o = self.in_features // a, self.out_features // a
        self.outer = nn.Parameter(torch.empty(terms, a, a, **kind))
        self.inner = nn.Parameter(torch.empty(terms, i, o, **kind))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both factors so that white input gives the output variance of `nn.Linear`, 1/3."""
        terms, i, _ = self.inner.shape
        nn.init.normal_(self.outer, std=math.sqrt(1 / self.options.side))
        nn.init.normal_(self.inner, std=math.sqrt(1 / (3 * terms * i)))

    def product(self, x: Tensor) -> Tensor:
        """Return x times the sum of products, bias not added."""
        grid = x.reshape(-1, 1, self.options.side, self.inner.shape[1])  # (N, 1, a, i)
        mixed = self.outer @ (grid @ self.inner)  # (N, K, a, o)
        return mixed.sum(1).reshape(*x.shape[:-1], self.out_features)
