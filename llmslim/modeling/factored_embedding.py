"""A token embedding of another width than the network behind it.

    y = block(weight[ids]),   weight (V, E), block E -> H

V E weights and a block instead of V H: with a large vocabulary the table is most of a small
model. The block is any structure, named by its own spec. The table is called `weight`, as in
`nn.Embedding`, so that transformers finds it where it ties or counts embeddings. It is not an
`nn.Embedding` on purpose: resizing the vocabulary builds a plain one and would drop the block.
What it leaves out: input embeddings given to the model directly are of width H, past the block.

Shapes: V = num_embeddings, E = embedding_dim, H = the network's hidden size.
"""

from __future__ import annotations

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
