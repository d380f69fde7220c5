"""A token embedding and an output head of another width than the network between them.

    y = block(weight[ids])          weight (V, E), block E -> H
    logits = block(x) weightᵀ       block H -> E, weight (V, E)

V E weights and a block instead of V H: with a large vocabulary the table is most of a small
model. The block is any structure, named by its spec. The table is called `weight`, as in
`nn.Embedding` and `nn.Linear`, so that transformers finds it where it ties or counts embeddings.
They are not subclasses of these on purpose: code that resizes, adapts or quantises those reads
their sizes off `weight` and would drop the block. Left out: a bias of the head, and input
embeddings given to the model directly, which are of width H and do not pass the block.

Shapes: V = tokens, E = width of the table, H = the network's hidden size.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .structured import build


class FactoredEmbedding(nn.Module):
    """A table of narrow token vectors and the block that widens them.

    Args:
        num_embeddings: number of tokens V.
        embedding_dim: width E of the table.
        projection: spec of the block from E to H, as `build` takes it.
        padding_idx: token whose vector starts at zero and gets no gradient.
        device: where the parameters live.
        dtype: the parameters' type.

    Raises:
        ValueError: if the block does not take E channels, or cannot be built.

    Example:
        >>> wide = {"structure": "linear", "in_features": 4, "out_features": 6, "bias": False}
        >>> FactoredEmbedding(10, 4, projection=wide)(torch.tensor([[1, 2]])).shape
        torch.Size([1, 2, 6])
    """

    name: ClassVar[str] = "factored_embedding"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        projection: dict[str, Any],
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.projection_spec = dict(projection)
        taken = self.projection_spec.get("in_features")
        if taken != embedding_dim:
            raise ValueError(
                f"the projection takes {taken} channels; the embedding gives {embedding_dim}"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.weight = nn.Parameter(
            torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        )
        self.projection = build(projection, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a new table as `nn.Embedding` does, in place; the block draws its own weights."""
        nn.init.normal_(self.weight)
        if self.padding_idx is not None:
            self.weight[self.padding_idx].fill_(0)

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids (...) to vectors (..., H)."""
        y: Tensor = self.projection(nn.functional.embedding(ids, self.weight, self.padding_idx))
        return y

    def spec(self) -> dict[str, Any]:
        """Return what `build` needs to make an empty module like this one; JSON values only."""
        return {
            "structure": self.name,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "padding_idx": self.padding_idx,
            "projection": dict(self.projection_spec),
        }

    def extra_repr(self) -> str:
        """Show the sizes the way `nn.Embedding` does."""
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"


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
