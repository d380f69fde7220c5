"""Find out whether the neurons of an MLP are independent of each other.

Neurons may be repeated, dropped and reordered only where each depends on its own rows of the
projections alone. Gemma 3n's sparse layers compare all of them to decide which are zero. The MLP is
run on the meta device, and every operation between its projections must be elementwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.compat import CAST, TorchDispatchMode

_ELEMENTWISE = {
    *("clone", "copy_", "split", "split_with_sizes", "unbind", "cat", "stack"),
    *("glu", "native_dropout", "bernoulli", "bernoulli_"),
}
"""Elementwise operations beside views, `..._like` and those that torch marks as pointwise; `glu`
multiplies the two halves of a fused projection's output."""


def has_independent_neurons(
    mlp: nn.Module, up: Sequence[nn.Module], down: nn.Module, weight_OM: Tensor
) -> bool:
    """Return whether no neuron of an MLP depends on another.

    Args:
        mlp: the module around its projections; one that needs more than hidden states to run is
            taken to have independent neurons.
        up: the projections that produce the neurons.
        down: the projection that reads them.
        weight_OM: its weight, (outputs, neurons).
    """
    empty = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*mlp.named_parameters(), *mlp.named_buffers())
    }
    hidden = torch.empty(1, 2, len(weight_OM), dtype=weight_OM.dtype, device="meta")
    watch = _Watch()
    handles = [
        *(each.register_forward_hook(lambda _m, _args, y: watch.mark(y)) for each in up),
        down.register_forward_pre_hook(lambda _m, _args: watch.end()),
    ]
    try:
        with torch.no_grad(), watch:
            torch.func.functional_call(mlp, empty, (hidden,))
    except Exception:  # it needs more than hidden states
        return True
    finally:
        for handle in handles:
            handle.remove()
    return not watch.mixed


class _Watch(TorchDispatchMode):
    """Watches operations on the outputs of projections until another projection reads them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mixed = False
        self._neurons: list[Tensor] = []
        self._ended = False

    def mark(self, output: Tensor) -> None:
        """Treat a tensor as neurons."""
        self._neurons.append(output)

    def end(self) -> None:
        """Stop watching."""
        self._ended = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation; note whether it mixes neurons."""
        output = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        flat = [each for one in given for each in (one if isinstance(one, list | tuple) else [one])]
        if not self._ended and any(each is known for each in flat for known in self._neurons):
            if not _is_elementwise(func):
                self.mixed = True
            outputs = output if isinstance(output, list | tuple) else [output]
            self._neurons += [each for each in outputs if isinstance(each, Tensor)]
        return output


def _is_elementwise(func: Any) -> bool:
    name = func.overloadpacket.__name__
    known = func is CAST or func.is_view or name in _ELEMENTWISE or name.endswith("_like")
    return known or torch.Tag.pointwise in func.tags
