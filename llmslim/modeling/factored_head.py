"""An output head of another width than the network before it: `factored_embedding`'s mirror.

    logits = block(x) weightᵀ,   block H -> E, weight (V, E)

The table is called `weight`, as in `nn.Linear`, so that it can be tied to the embedding's. It is
not an `nn.Linear` on purpose: code that resizes, adapts or quantises those reads their sizes off
`weight` and would pass the block by. What it leaves out: a bias.

Shapes: V = out_features, E = the table's width, H = the network's hidden size.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .structured import build


class FactoredHead(nn.Module):
    """The block that narrows hidden states, and the table that turns them into logits.

    Args:
        out_features: number of tokens V.
        projection: spec of the block from H to E, as `build` takes it.
        device: where the parameters live.
        dtype: the parameters' type.

    Raises:
        ValueError: if the block cannot be built.

    Example:
        >>> narrow = {"structure": "linear", "in_features": 6, "out_features": 4, "bias": False}
        >>> FactoredHead(10, projection=narrow)(torch.ones(1, 2, 6)).shape
        torch.Size([1, 2, 10])
    """

    name: ClassVar[str] = "factored_head"

    def __init__(
        self,
        out_features: int,
        *,
        projection: dict[str, Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.projection_spec = dict(projection)
        self.projection = build(projection, device=device, dtype=dtype)
        self.in_features = int(projection["in_features"])
        self.out_features = out_features
        width = int(projection["out_features"])
        self.weight = nn.Parameter(torch.empty(out_features, width, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a new table as `nn.Linear` does, in place; the block draws its own weights."""
        bound = math.sqrt(1 / self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states (..., H) to logits (..., V)."""
        return nn.functional.linear(self.projection(x), self.weight)

    def spec(self) -> dict[str, Any]:
        """Return what `build` needs to make an empty module like this one; JSON values only."""
        return {
            "structure": self.name,
            "out_features": self.out_features,
            "projection": dict(self.projection_spec),
        }

    def extra_repr(self) -> str:
        """Show the sizes the way `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
