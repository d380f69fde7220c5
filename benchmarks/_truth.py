"""What a model of fewer layers computes, worked out without removing any: the others let through.

Every layer that stays is called with what the dense model's own loop hands it, so whatever it does
that depends on its index or on the number of layers, it does as in the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

HANDED_ON = {
    "glm_moe_dsa": "prev_topk_indices",
    "hy_v4": "prev_topk_indices",
    "mistral_large4": "prev_topk_indices",
    "zaya": 1,
}
"""What layers hand each other beside the hidden states, as second output: the argument it is."""
_USUAL = ("layers", "layer", "h", "blocks", "block")
"""What lists of decoder layers are called, beside others that run one after the other."""


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

    def __init__(self, model: Any, run: Callable[[Any], Tensor]) -> None:
        """Run the model once and look for its layers: what runs one after the other.

        Args:
            model: the dense model; its layers' `forward` is exchanged while it is run otherwise.
            run: returns its logits.

        Raises:
            UndefinedError: if its layers cannot be found.
        """
        self.model, self.run = model, run
        self.handed_on = HANDED_ON.get(
            model.config.get_text_config().model_type.removesuffix("_text")
        )
        self.path, self.layers, self.calls = _watch(model, run)

    def skipping(self, keep: Sequence[int]) -> Tensor:
        """Return the logits with only `keep` at work, in the dense model's order."""
        gone = [index for index in range(len(self.layers)) if index not in keep]
        return self._with({index: self._through(index) for index in gone})

    def in_order(self, keep: Sequence[int]) -> Tensor:
        """Return the logits with the layers `keep` at work in their order, in the first's place.

        Raises:
            UndefinedError: if more goes on between the layers than that one calls the next.
        """
        some = [index for index in range(len(self.layers)) if index % 3 != 1]
        if self.handed_on is not None or difference(self._chain(some), self.skipping(some)) > 1e-5:
            raise UndefinedError("more goes on between its layers than that one calls the next")
        return self._chain(keep)

    def _chain(self, keep: Sequence[int]) -> Tensor:
        forwards = [layer.forward for layer in self.layers]
        # Some layers wait for an image, and do nothing here.
        called = [index for index, call in enumerate(self.calls) if call is not None]
        first, *others = called

        def chain(*args: Any, **kwargs: Any) -> Any:
            hidden = _hidden(args, kwargs, self._call(first).output)
            output = self._output(self._call(first).output, hidden, args, kwargs)
            for index in keep:
                if index in called:
                    args, kwargs = _with_hidden(self._call(index), hidden)
                    output = forwards[index](*args, **kwargs)
                    hidden = _first_like(output, hidden)
            return output

        return self._with({first: chain} | {index: self._through(index) for index in others})

    def _call(self, index: int) -> Call:
        call = self.calls[index]
        assert call is not None
        return call

    def _through(self, index: int) -> Callable[..., Any]:
        """Return what takes the place of a layer's forward, and does nothing."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = self._call(index).output
            return self._output(output, _hidden(args, kwargs, output), args, kwargs)

        return forward

    def _with(self, forwards: dict[int, Callable[..., Any]]) -> Tensor:
        for index, forward in forwards.items():
            self.layers[index].forward = forward
        try:
            return self.run(self.model)
        finally:
            for index in forwards:
                del self.layers[index].forward

    def _output(self, like: Any, hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return what a layer would that does nothing.

        Raises:
            UndefinedError: if its output is of another kind.
        """
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
    model: Any, run: Callable[[Any], Tensor]
) -> tuple[str, list[nn.Module], list[Call | None]]:
    """Return the decoder layers: the list of modules that runs one after the other, and how.

    Raises:
        UndefinedError: if there is none, or no telling which.
    """
    stacks = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    }
    calls: dict[nn.Module, list[Call]] = {m: [] for stack in stacks.values() for m in stack}
    order: list[nn.Module] = []

    def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[module].append(Call(args, dict(kwargs), output))
        order.append(module)

    handles = [module.register_forward_hook(see, with_kwargs=True) for module in calls]
    try:
        run(model)
    finally:
        for handle in handles:
            handle.remove()
    # Layers that only images need are not called for text.
    ran = {
        name: stack
        for name, stack in stacks.items()
        if 2 * sum(bool(calls[module]) for module in stack) > len(stack)
        and [module for module in order if module in set(stack)]
        == [module for module in stack if calls[module]]
    }
    if model.config.is_encoder_decoder:
        inside = set(model.get_decoder().modules())
        ran = {name: stack for name, stack in ran.items() if inside.issuperset(stack)}
    usual = {name: stack for name, stack in ran.items() if name.rpartition(".")[2] in _USUAL}
    ran = usual or ran
    if not ran or (not usual and len(ran) > 1):
        raise UndefinedError(f"{len(ran)} lists of modules run one after the other")

    def size(name: str) -> int:
        return sum(p.numel() for module in ran[name] for p in module.parameters())

    path = max(ran, key=size)
    return path, ran[path], [calls[layer][0] if calls[layer] else None for layer in ran[path]]


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    """Return the hidden states among a layer's arguments: the first that comes out as large.

    Raises:
        UndefinedError: if there are none.
    """
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
    return [
        t for t in ([output] if isinstance(output, Tensor) else output) if isinstance(t, Tensor)
    ]


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


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, in standard deviations of the second; infinite where NaN."""
    if one.shape != other.shape or not bool(one.isfinite().all()):
        return float("inf")
    return float((one.double() - other.double()).abs().max() / other.double().std())
