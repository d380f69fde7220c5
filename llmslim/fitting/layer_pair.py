"""One decoder layer between two streams: what its projections are given, and what they should give.

The dense copy of the layer reads the dense stream, the layer itself, as far as it is slim, the slim
one. Everything that a fit of the layer looks at is gathered here, in passes over the windows.

Shapes: N = windows of a batch (1 on a processor), L = tokens of a window, D = hidden size,
I = in_features, O = out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.anatomy.layer_calls import Extra, importance, run_layer
from llmslim.anatomy.sites import is_projection, out_features_of
from llmslim.fitting.layer_store import Streams
from llmslim.fitting.moments import Moments
from llmslim.init import wide

_ADDITIVE = 1e-2
"""Largest relative difference at which a projection still counts as added to the stream."""


@dataclass
class Tail:
    """The end of a layer: a module whose output is added to the stream as it is."""

    module: nn.Module
    inputs: list[tuple[Tensor, Tensor]]
    """The slim stream without what the module adds, and the module's input, for each window."""


@dataclass
class LayerOutputs:
    """What a step of a layer's fit has computed of the streams after the layer.

    The last step of a layer leaves them behind, so that no window is run once more for them.
    """

    dense: list[Tensor]
    """The dense stream after the layer, for each window."""
    tail: list[tuple[Tensor, Tensor]]
    """The slim stream without the last module, and that module's input, for each window."""
    module: Callable[[Tensor], Tensor] | None = None
    """The last module, as it was fitted."""


class LayerPair:
    """A decoder layer as it was and as it is, each with its stream.

    Args:
        dense: a copy that stays dense.
        slim: the model's own layer; whatever is put in place in it is seen at once.
        streams: hidden states before the layer.
        extras: the layer's other arguments, for each window.
        fitting: how many of the windows are to fit on; the rest is held out.
        autocast: type of its products; None for its own.
    """

    def __init__(
        self,
        dense: nn.Module,
        slim: nn.Module,
        streams: Streams,
        extras: Sequence[Extra],
        fitting: int,
        autocast: torch.dtype | None,
    ) -> None:
        self.dense, self.slim, self.streams = dense, slim, streams
        self.fitting = fitting
        self._extras, self._autocast = extras, autocast

    def run(self, layer: nn.Module, window: int, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Run either layer on a window of its stream; arguments and results of `run_layer`."""
        x = (self.streams.dense if layer is self.dense else self.streams.slim)[window]
        return run_layer(layer, x, self._extras[window], autocast=self._autocast, **kwargs)

    def outputs(self, layer: nn.Module) -> list[Tensor]:
        """Return what either layer makes of its stream."""
        return [self.run(layer, window)[0] for window in range(len(self.streams.slim))]

    def after(self, known: LayerOutputs | None) -> Streams:
        """Return both streams after the layer.

        Args:
            known: what the last step has computed of them; it is used up.
        """
        if known is None:
            return Streams(self.outputs(self.dense), self.outputs(self.slim))
        if known.module is None:
            return Streams(known.dense, self.outputs(self.slim))
        device, fast = known.dense[0].device.type, self._autocast is not None
        with torch.autocast(device, self._autocast, enabled=fast):
            # In place: the parts are of no further use.
            slim = [before.add_(known.module(x)) for before, x in known.tail]
        return Streams(known.dense, slim)

    def run_slim(self, *, fit: bool) -> None:
        """Run the slim layer over the windows to fit on, or those held out, for its hooks."""
        both = range(len(self.streams.slim))
        for window in both[: self.fitting] if fit else both[self.fitting :]:
            self.run(self.slim, window)

    def inputs(self, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
        """Return what modules of the slim layer are given in the first window, as they run."""
        return self.run(self.slim, 0, inputs_of=modules)[1]

    def adds_to_stream(self, site: nn.Module) -> bool:
        """Return whether the slim layer adds a projection's output to the stream as it is."""
        return out_features_of(site) == self.streams.slim[0].shape[-1] and self._adds(site)

    def _adds(self, module: nn.Module) -> bool:
        try:
            whole, inputs = self.run(self.slim, 0, inputs_of={"x": module})
            added: Any = self.added(module, inputs["x"])
        except (IndexError, TypeError):  # it is given more than one tensor, or by name
            return False
        # One of several streams side by side, say, or several results.
        if not isinstance(added, Tensor) or added.shape != whole.shape:
            return False
        if not is_projection(module) and inputs["x"].shape != whole.shape:
            return False
        without, _ = self.run(self.slim, 0, zeroed=[module])
        return bool((whole - without - added).norm() < _ADDITIVE * added.norm())

    def added(self, module: nn.Module, x: Tensor) -> Any:
        """Return what a module of the slim layer makes of an input; a tensor as the stream is."""
        fast = self._autocast is not None
        with torch.autocast(x.device.type, self._autocast, enabled=fast):
            y = module(x if fast else x.to(next(module.parameters()).dtype))
        return wide(y) if isinstance(y, Tensor) else y

    def tail(self, names: Sequence[str]) -> Tail | None:
        """Return the smallest end of the slim layer that holds some projections, if it has one.

        What comes before it does not change with them, so it is run once.

        Args:
            names: of the projections in the layer.
        """
        path = names[0]
        while path:
            module = self.slim.get_submodule(path)
            if all(f"{name}.".startswith(f"{path}.") for name in names) and self._adds(module):
                return Tail(module, [self._without(module, w) for w in self._windows(fit=True)])
            path = path.rpartition(".")[0]
        return None

    def _without(self, module: nn.Module, window: int) -> tuple[Tensor, Tensor]:
        before, seen = self.run(self.slim, window, inputs_of={"x": module}, zeroed=[module])
        return before, seen["x"]

    def inner_moments(self, name: str, *, fit: bool = True) -> Moments:
        """Return moments of a projection's slim inputs against its dense inputs.

        Args:
            name: of the projection in the layer.
            fit: take the windows to fit on, too.
        """

        def pairs() -> Iterator[tuple[int, Tensor, Tensor, None]]:
            for window in self._windows(fit=fit):
                x, y = (self._input(layer, window, name) for layer in (self.slim, self.dense))
                yield window, x, y, None

        return self._gather(pairs())

    def writer_moments(
        self, name: str, later: Sequence[str], *, fit: bool = True
    ) -> tuple[Moments, LayerOutputs | None]:
        """Return moments of a writing projection's slim inputs against what it should add.

        Where nothing runs after the projection that would change, the second result is what is
        known of the streams after the layer; its `module` is for the caller to set.

        Args:
            name: of the projection in the layer.
            later: writers that run after it and are fitted in their turn; they add nothing yet.
            fit: take the windows to fit on, too.
        """
        writer = self.slim.get_submodule(name)
        bias: Any = getattr(writer, "bias", None)
        later_dense = [self.dense.get_submodule(other) for other in later]
        later_slim = [self.slim.get_submodule(other) for other in later]
        outputs = None if later or not fit else LayerOutputs([], [])

        def pairs() -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
            for window in self._windows(fit=fit):
                after, _ = self.run(self.dense, window, zeroed=later_dense)
                before, seen = self.run(
                    self.slim, window, inputs_of={"x": writer}, zeroed=[writer, *later_slim]
                )
                if outputs is not None:
                    outputs.dense.append(after)
                    outputs.tail.append((before, seen["x"]))
                # The block keeps the bias, so it is no part of what the weight has to reach.
                target = after - before if bias is None else after - before - wide(bias)
                yield window, seen["x"], target, importance(after)

        return self._gather(pairs()), outputs

    def _windows(self, *, fit: bool) -> range:
        """Return the windows to look at, the ones to fit on (if wanted) first."""
        return range(0 if fit else self.fitting, len(self.streams.slim))

    def _input(self, layer: nn.Module, window: int, name: str) -> Tensor:
        site = {"x": layer.get_submodule(name)}
        return self.run(layer, window, inputs_of=site, stop_after_inputs=True)[1]["x"]

    def _gather(self, pairs: Iterator[tuple[int, Tensor, Tensor, Tensor | None]]) -> Moments:
        moments: Moments | None = None
        for window, x, y, weight in pairs:
            if moments is None:
                moments = Moments.of(x.shape[-1], y.shape[-1], device=x.device)
            into = moments.fit if window < self.fitting else moments.held_out
            x, y = wide(x), wide(y)
            if weight is not None:
                x, y = x * weight, y * weight
            into.update(x, y)
        assert moments is not None
        return moments
