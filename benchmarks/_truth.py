"""What a model of fewer layers computes, worked out without removing any: the others let through.

Every layer that stays is called with what the dense model's own loop hands it, so whatever it does
that depends on its index or on the number of layers, it does as in the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HANDED_ON = {
    "glm_moe_dsa": "prev_topk_indices",
    "hy_v4": "prev_topk_indices",
    "mistral_large4": "prev_topk_indices",
    "zaya": 1,
}
"""What layers hand each other beside the hidden states, as second output: the argument it is."""


class UndefinedError(Exception):
    """There is no such truth of this model: why."""


@dataclass
class Call:
    """How the dense model called a layer, and what came back."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class Truth:
    """A dense model that can be run with some of its layers skipped."""

    def __init__(
        self, model: nn.Module, count: int, run: Callable[[nn.Module], Tensor], kind: str
    ) -> None:
        """Run the model once and look at its layers.

        Args:
            model: the dense model; its layers' `forward` is exchanged while it is run otherwise.
            count: how many decoder layers its config says.
            run: returns its logits.
            kind: its model type.

        Raises:
            UndefinedError: if its layers cannot be told from the rest.
        """
        self.model, self.run = model, run
        self.handed_on = HANDED_ON.get(kind)
        self.layers, self.calls, self.dense = _watch(model, count, run)

    def skipping(self, keep: Sequence[int]) -> Tensor:
        """Return the logits with only `keep` at work, in the dense model's order."""

        def through(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                call = self.calls[index]
                return self._output(call.output, _hidden(args, kwargs, call.output), args, kwargs)

            return forward

        gone = [index for index in range(len(self.layers)) if index not in keep]
        return self._with({index: through(index) for index in gone})

    def in_order(self, keep: Sequence[int]) -> Tensor:
        """Return the logits with the layers `keep` at work in their order, all in the first's place.

        Raises:
            UndefinedError: if more goes on between the layers than that one calls the next.
        """
        some = [index for index in range(len(self.layers)) if index % 3 != 1]
        if self.handed_on is not None or _far(self._chain(some), self.skipping(some)):
            raise UndefinedError("more goes on between its layers than that one calls the next")
        return self._chain(keep)

    def _chain(self, keep: Sequence[int]) -> Tensor:
        forwards = [layer.forward for layer in self.layers]

        def chain(*args: Any, **kwargs: Any) -> Any:
            output = None
            hidden = _hidden(args, kwargs, self.calls[0].output)
            for index in keep:
                call = self.calls[index]
                args, kwargs = _with_hidden(call, hidden)
                output = forwards[index](*args, **kwargs)
                hidden = _first_like(output, hidden)
            return output

        def through(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                call = self.calls[index]
                return self._output(call.output, _hidden(args, kwargs, call.output), args, kwargs)

            return forward

        return self._with({0: chain} | {i: through(i) for i in range(1, len(self.layers))})

    def _with(self, forwards: dict[int, Callable[..., Any]]) -> Tensor:
        for index, forward in forwards.items():
            self.layers[index].forward = forward  # type: ignore[method-assign]
        try:
            return self.run(self.model)
        finally:
            for index in forwards:
                del self.layers[index].forward

    def _output(self, like: Any, hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return what a layer would that does nothing."""
        if isinstance(like, Tensor):
            return hidden
        if type(like) not in (tuple, list):
            raise UndefinedError(f"its layers return {type(like).__name__}")
        found = list(like)
        found[_place(like, hidden)] = hidden
        if isinstance(self.handed_on, str):
            found[1] = kwargs[self.handed_on]
        elif self.handed_on is not None:
            found[1] = args[self.handed_on]
        return type(like)(found)


def _watch(
    model: nn.Module, count: int, run: Callable[[nn.Module], Tensor]
) -> tuple[list[nn.Module], list[Call], Tensor]:
    """Return the layers that a forward pass goes through one after the other, and how."""
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    seen: dict[int, list[Call]] = {}
    order: list[int] = []
    handles = []
    for module in {id(m): m for stack in stacks for m in stack}.values():

        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.setdefault(id(module), []).append(Call(args, dict(kwargs), output))
            order.append(id(module))

        handles.append(module.register_forward_hook(see, with_kwargs=True))
    try:
        dense = run(model)
    finally:
        for handle in handles:
            handle.remove()
    ran = [stack for stack in stacks if [len(seen.get(id(m), ())) for m in stack] == [1] * count]
    ran = [
        stack
        for stack in ran
        if [place for place in order if place in {id(m) for m in stack}] == [id(m) for m in stack]
    ]
    if len(ran) != 1:
        raise UndefinedError(f"{len(ran)} lists of {count} layers run one after the other")
    layers = list(ran[0])
    return layers, [seen[id(layer)][0] for layer in layers], dense


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    """Return the hidden states among a layer's arguments: the first that comes out as large."""
    shapes = [t.shape for t in _tensors(output)]
    given = [*args, *kwargs.values()]
    for value in given:
        if isinstance(value, Tensor) and value.shape in shapes and value.is_floating_point():
            return value
    raise UndefinedError("its layers take no hidden states that come out as large")


def _with_hidden(call: Call, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return how a layer was called, with other hidden states."""
    old = _hidden(call.args, call.kwargs, call.output)
    args = tuple(hidden if value is old else value for value in call.args)
    return args, {k: hidden if value is old else value for k, value in call.kwargs.items()}


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in ([output] if isinstance(output, Tensor) else output) if isinstance(t, Tensor)]


def _place(output: Sequence[Any], hidden: Tensor) -> int:
    for place, value in enumerate(output):
        if isinstance(value, Tensor) and value.shape == hidden.shape:
            return place
    raise UndefinedError("its layers return no hidden states")


def _first_like(output: Any, hidden: Tensor) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found: Tensor = output[_place(output, hidden)]
    return found


def _far(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-5 * other.std())


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, in standard deviations of the second; infinite where NaN."""
    if one.shape != other.shape or not bool(one.isfinite().all()):
        return float("inf")
    return float((one.double() - other.double()).abs().max() / other.double().std())


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are bitwise the same."""
    return torch.equal(one, other)
