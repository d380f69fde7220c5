"""What a block multiplies with: its own weights, or each row with the weights of its own expert.

A structure writes its product once, `product_by(x, by)`, in terms of three products with weights
that it names: an `nn.Linear`, a batched product, and a choice of channels. `Own` takes the weights
of the block at hand. The other two take those of E blocks, which are stacked in one tensor each,
without a loop over experts in the graph:

- `Gathered`, for rows in any order: the weights that each row needs are copied for it. Memory and
  time grow with the rows; best for a few of them, and what `batched_mm` asks for.
- `Sorted`, for rows sorted by expert: torch's grouped product, as `grouped_mm` asks for. Where no
  graph is traced, a processor loops over the experts that have rows, where that is faster.

What it leaves out: a kernel that multiplies with several factors at once.

Shapes: E = experts, N = rows, G = groups, K and O = channels in and out, C = channels chosen from.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from .compat import grouped_product


class Products(Protocol):
    """Products with weights of a block, given by their names in it."""

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Return x (N, K) times an `nn.Linear`, (N, O)."""

    def bmm(self, x_GNK: Tensor, name: str) -> Tensor:
        """Return each of G matrices times its own, a parameter (G, K, O), as (G, N, O)."""

    def take(self, x_NC: Tensor, name: str) -> Tensor:
        """Return the channels that an index buffer of any shape names, one after the other."""

    def of(self, name: str) -> Products:
        """Return the products with the weights of a block inside this one."""


class Own:
    """Products with the weights of one block; its `nn.Linear` are called as modules.

    Args:
        block: the block.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Call the module: what other libraries add to one takes part."""
        y: Tensor = getattr(self.block, name)(x)
        return y

    def bmm(self, x_GNK: Tensor, name: str) -> Tensor:
        """Multiply."""
        return torch.bmm(x_GNK, getattr(self.block, name))

    def take(self, x_NC: Tensor, name: str) -> Tensor:
        """Choose."""
        return take_channels(x_NC, getattr(self.block, name).flatten())

    def of(self, name: str) -> Own:
        """Go inside."""
        return Own(getattr(self.block, name))


class Gathered:
    """Products of rows in any order, each with the weights of its own expert.

    Args:
        tensors: all experts' parameters and buffers by their names, E in front.
        expert_N: the expert of each row.
        inside: where in the block the names begin.
    """

    def __init__(self, tensors: dict[str, Tensor], expert_N: Tensor, inside: str = "") -> None:
        self.tensors, self.expert_N, self.inside = tensors, expert_N, inside

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Multiply each row with a matrix of its own."""
        weight_NOK = self.tensors[f"{self.inside}{name}.weight"][self.expert_N]
        return torch.bmm(weight_NOK, x.unsqueeze(-1)).squeeze(-1)

    def bmm(self, x_GNK: Tensor, name: str) -> Tensor:
        """Multiply each row's groups with matrices of their own."""
        weight_NGKO = self.tensors[self.inside + name][self.expert_N]
        y_NG1O = torch.matmul(x_GNK.transpose(0, 1).unsqueeze(-2), weight_NGKO)
        return y_NG1O.squeeze(-2).transpose(0, 1)

    def take(self, x_NC: Tensor, name: str) -> Tensor:
        """Choose each row's channels by an order of its own."""
        return x_NC.gather(-1, self.tensors[self.inside + name].flatten(1)[self.expert_N])

    def of(self, name: str) -> Gathered:
        """Go inside."""
        return Gathered(self.tensors, self.expert_N, f"{self.inside}{name}.")


class Sorted:
    """Products of rows that are sorted by expert.

    Args:
        tensors: all experts' parameters and buffers by their names, E in front.
        end_E: where each expert's rows end.
        inside: where in the block the names begin.
    """

    def __init__(self, tensors: dict[str, Tensor], end_E: Tensor, inside: str = "") -> None:
        self.tensors, self.end_E, self.inside = tensors, end_E, inside
        self.counts: list[int] | None = None
        # Not in a traced graph, which must hold for any rows, and not where contents are not known.
        if (
            end_E.device.type == "cpu"
            and type(end_E) is Tensor
            and not torch.compiler.is_compiling()
        ):
            ends = end_E.tolist()
            self.counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Multiply the rows of each expert with its matrix."""
        return grouped_product(x, self.tensors[f"{self.inside}{name}.weight"].mT, self.end_E)

    def bmm(self, x_GNK: Tensor, name: str) -> Tensor:
        """Multiply the rows of each expert with its matrices."""
        weight_EGKO = self.tensors[self.inside + name]
        if self.counts is None:
            pairs = zip(x_GNK, weight_EGKO.unbind(1), strict=True)
            return torch.stack([grouped_product(x, weight, self.end_E) for x, weight in pairs])
        parts = zip(x_GNK.split(self.counts, dim=1), weight_EGKO.unbind(), strict=True)
        return torch.cat([torch.bmm(x, weight) for x, weight in parts if x.shape[1]], dim=1)

    def take(self, x_NC: Tensor, name: str) -> Tensor:
        """Choose the channels of each expert's rows by its order."""
        order_EK = self.tensors[self.inside + name].flatten(1)
        if self.counts is None:
            row_N = torch.arange(x_NC.shape[0], device=x_NC.device)
            expert_N = (row_N.unsqueeze(1) >= self.end_E).sum(1)
            return x_NC.gather(-1, order_EK[expert_N])
        parts = zip(x_NC.split(self.counts), order_EK.unbind(), strict=True)
        return torch.cat([take_channels(x, order) for x, order in parts if len(x)])

    def of(self, name: str) -> Sorted:
        """Go inside."""
        return Sorted(self.tensors, self.end_E, f"{self.inside}{name}.")


def take_channels(x: Tensor, order: Tensor) -> Tensor:
    """Return the channels `order` (K,) of x (..., C), as (..., K).

    Args:
        x: values.
        order: channels, int64.
    """
    if x.device.type == "cpu" and x.element_size() == 2:
        # torch selects channels of two bytes one by one, and gathers them twice as fast.
        return x.gather(-1, order.expand(*x.shape[:-1], -1))
    return x.index_select(-1, order)
