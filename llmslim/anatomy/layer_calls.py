"""Run one decoder layer at a time, of any architecture, on two streams of hidden states.

A whole model is never needed at once: every decoder layer is called with hidden states and with
arguments (masks, rotary embeddings; here and there what follows from the token ids) that do not
depend on them. One pass with every layer made a pass-through records the arguments; after that each
layer can be run alone.

Shapes: N = windows of a batch, L = tokens of a window, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.anatomy import bf16_is_fast
from llmslim.anatomy.sites import is_projection, out_features_of
from llmslim.errors import TargetError
from llmslim.init import wide


def fast_type(device: torch.device, own: torch.dtype) -> torch.dtype | None:
    """Return the type to multiply in beside a float32 stream, None for a model's own throughout.

    Args:
        device: where the model is.
        own: its type. What bfloat16 rounds away is far below what any structure of fewer weights
            loses; a model in float64 is there to be exact.
    """
    if own == torch.float64:
        return None
    return torch.bfloat16 if bf16_is_fast(device) else None


def importance(stream: Tensor) -> Tensor:
    """Return a factor for each token, 1 for most and less where the stream is enormous.

    An error in the residual stream matters in proportion to the stream, for the next norm divides
    by it; unweighted, the few tokens of enormous streams would be all that is fitted.

    Args:
        stream: hidden states, (N, L, D).
    """
    rms = stream.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-20)
    return (3 * rms.nanmedian() / rms).clamp_max(1.0)


class _Stop(Exception):  # noqa: N818  (a way out of a forward pass, no error)
    """Ends a forward pass once everything was recorded."""


Extra = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a layer beside the hidden states."""


@dataclass
class Calls:
    """The arguments that a model passes to its decoder layers."""

    hidden: list[Tensor] = field(default_factory=list)
    """Input of the first layer, (N, L, D) for each batch."""
    extras: list[list[Extra]] = field(default_factory=list)
    """Other arguments of each layer, for each batch; what is equal is kept once."""


@torch.no_grad()
def record_calls(model: Any, layers: Sequence[nn.Module], batches: list[Tensor]) -> Calls:
    """Return the arguments of each decoder layer; only the first layer is really run.

    Args:
        model: a causal language model; its head is not reached.
        layers: its decoder layers, in order.
        batches: token ids, (N, L), all of one shape.

    Raises:
        TargetError: if the layers do not run one after the other on hidden states alone.
        OutOfMemoryError: as torch raises it.
    """
    try:
        return _Recording(model, layers, batches[0]).of(batches)
    except torch.OutOfMemoryError:
        raise  # no property of the model
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        why = f"its layers cannot be run one by one ({type(error).__name__}: {error})"
        raise TargetError(_unfit(model, why)) from error


def _unfit(model: nn.Module, why: str) -> str:
    return (
        f"{type(model).__name__}: {why}; a fit to text runs one decoder layer at a time on hidden "
        "states alone. Use init: project, and no structure auto."
    )


class _Recording:
    """Stand-ins for decoder layers that record their arguments.

    Args:
        model: a causal language model.
        layers: its decoder layers, in order.
        batch: token ids, to see what a layer returns.
    """

    def __init__(self, model: Any, layers: Sequence[nn.Module], batch: Tensor) -> None:
        self._model, self._layers = model, layers
        if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
            raise TargetError(_unfit(model, "its last layers read keys and values of earlier ones"))
        self._form = _form(model, layers, batch)
        self._calls = Calls(extras=[[] for _ in layers])
        self._next = 0
        """The layer that is expected to run next."""
        self._given: Tensor | None = None
        """The output that the layer before it stands for."""

    def of(self, batches: list[Tensor]) -> Calls:
        """Run the model on batches; return what its layers are called with.

        Raises:
            TargetError: if they cannot be run one by one.
        """
        with ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                stack.enter_context(replaced_forward(layer, self._stand_in(index)))
            for batch in batches:
                self._next = 0
                with suppress(_Stop):
                    self._model(input_ids=batch, use_cache=False)
                if self._next < len(self._layers):
                    raise TargetError(self._out_of_turn())
        return self._calls

    def _stand_in(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            # A cache would grow with every run.
            kept = {key: value for key, value in kwargs.items() if "past_key_value" not in key}
            self._check(index, hidden, (*args[1:], *kept.values()))
            if index == 0:
                self._calls.hidden.append(wide(hidden.detach()))
            extra, known = (args[1:], kept), self._calls.extras[index]
            known.append(_kept_once(extra, known[0]) if known else extra)
            self._given, self._next = hidden, index + 1
            if self._next == len(self._layers):
                raise _Stop
            return self._form.holding(hidden)

        return forward

    def _check(self, index: int, hidden: Tensor, others: Sequence[Any]) -> None:
        """Refuse a layer's inputs if earlier layers pass it more than hidden states.

        Raises:
            TargetError: if they have.
        """
        if index != self._next:
            raise TargetError(self._out_of_turn())
        before = self._given
        if index and before is not None and not torch.equal(hidden, before):
            raise TargetError(
                _unfit(self._model, "more than its list of layers works on the hidden states")
            )
        # Empty ones, None among them, may be met anywhere.
        states = [s for s in self._form.rest if isinstance(s, Tensor) or s]
        if any(other is state for state in states for other in others):
            raise TargetError(
                _unfit(self._model, "its layers hand each other more than the hidden states")
            )

    def _out_of_turn(self) -> str:
        return _unfit(self._model, "its layers do not run once each, in the order of their list")


@dataclass
class _Form:
    """What a decoder layer returns: hidden states, alone or first of several."""

    kind: type | None
    """The class of what holds several; None for hidden states alone."""
    rest: tuple[Any, ...] = ()
    """The others, as the first layer gave them."""

    def holding(self, hidden: Tensor) -> Any:
        """Return hidden states as a layer would."""
        return hidden if self.kind is None else self.kind((hidden, *self.rest))


def _kept_once(value: Any, known: Any) -> Any:
    """Return a value with every tensor of it that equals the known one's replaced by that."""
    if isinstance(value, Tensor) and isinstance(known, Tensor):
        same = value is known or (value.shape == known.shape and torch.equal(value, known))
        return known if same else value
    if isinstance(value, tuple) and isinstance(known, tuple) and len(value) == len(known):
        return tuple(_kept_once(one, other) for one, other in zip(value, known, strict=True))
    if isinstance(value, dict) and isinstance(known, dict):
        return {key: _kept_once(one, known.get(key)) for key, one in value.items()}
    return value


def _form(model: nn.Module, layers: Sequence[nn.Module], batch: Tensor) -> _Form:
    """Return the form of what decoder layers return, by running the first.

    Raises:
        TargetError: if it has none that could be handed on.
    """
    seen: list[Any] = []

    def look(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output)
        raise _Stop

    handle = layers[0].register_forward_hook(look)
    try:
        with suppress(_Stop):
            model(input_ids=batch[:1, :4], use_cache=False)
    finally:
        handle.remove()
    if not seen:
        raise TargetError(_unfit(model, "its layers are not called on text"))
    output = seen[0]
    if isinstance(output, Tensor):
        return _Form(None)
    if type(output) not in (tuple, list):
        raise TargetError(_unfit(model, f"its layers return {type(output).__name__}"))
    return _Form(type(output), tuple(output[1:]))


class TailModel:
    """The end of a model: the decoder layers from some point on, and the head.

    Args:
        model: a causal language model.
        layers: its decoder layers, in order.
        ids: token ids of some text, (N, L).
        dropped: layers that are left out, by index.
        autocast: type for products; None runs the model in its own.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        ids: Tensor,
        dropped: Iterable[int] = (),
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        self._model, self._layers, self._dropped = model, layers, frozenset(dropped)
        self._narrow = autocast is not None
        self._autocast = torch.autocast(ids.device.type, autocast, enabled=self._narrow)
        with torch.no_grad(), self._autocast:
            self._form = _form(model, layers, ids)

    def logits(self, start: int, hidden: Tensor, ids: Tensor) -> Tensor:
        """Run a model from one decoder layer on.

        Args:
            start: the first layer that runs; as many as there are for the head alone.
            hidden: that layer's input, (N, L, D).
            ids: the token ids it comes from, (N, L).

        Returns:
            Logits, (N, L, V).
        """
        own = next(self._model.parameters()).dtype
        answer = self._form.holding(hidden if self._narrow else hidden.to(own))
        with ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                if index < start:
                    forward = lambda *_args, **_kwargs: answer  # noqa: E731
                elif index in self._dropped:
                    forward = self._pass_on
                else:
                    continue
                stack.enter_context(replaced_forward(layer, forward))
            stack.enter_context(self._autocast)
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits

    def _pass_on(self, *args: Any, **kwargs: Any) -> Any:
        return self._form.holding(args[0] if args else kwargs["hidden_states"])


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another forward pass, for a while."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _zeros_of(module: nn.Module) -> Callable[..., Tensor]:
    """Return a forward pass that gives zeros without any product.

    What is no projection is taken to give as many features as it is given.
    """
    if not is_projection(module):
        return lambda x, *_args, **_kwargs: torch.zeros_like(x)
    out_features = out_features_of(module)
    return lambda x, *_args, **_kwargs: x.new_zeros(*x.shape[:-1], out_features)


def _in_own_type(norm: nn.LayerNorm, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hand a norm its input in its weights' type: torch refuses any other under autocast."""
    weight = norm.weight
    return args if weight is None else (args[0].to(weight.dtype), *args[1:])


@contextmanager
def layer_norms_in_own_type(module: nn.Module) -> Iterator[None]:
    """Let the LayerNorms of a module take inputs of any type, as autocast gives them."""
    norms = (each for each in module.modules() if isinstance(each, nn.LayerNorm))
    handles = [norm.register_forward_pre_hook(_in_own_type) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def type_taken(layer: nn.Module, calls: Calls, fast: torch.dtype | None) -> torch.dtype | None:
    """Return a type for products if the code of a model's first layer takes it, else None.

    Args:
        layer: the model's first decoder layer.
        calls: what the model hands to its layers.
        fast: the type; None for the model's own.
    """
    try:
        run_layer(layer, calls.hidden[0], calls.extras[0][0], autocast=fast)
    except RuntimeError:
        # X-MOD writes what its adapters give, in one type, into what has the other.
        return None
    return fast


def run_layer(
    layer: nn.Module,
    hidden: Tensor,
    extra: Extra,
    *,
    autocast: torch.dtype | None = None,
    inputs_of: dict[str, nn.Module] | None = None,
    zeroed: Sequence[nn.Module] = (),
    stop_after_inputs: bool = False,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Run one decoder layer on one batch.

    Args:
        layer: the decoder layer.
        hidden: its input, (N, L, D), at least float32; the stream itself is never rounded.
        extra: its other arguments.
        autocast: type for its products; None runs it in its own.
        inputs_of: modules whose input is wanted, by name.
        zeroed: modules whose output is taken for zero: what they would have added is left out.
        stop_after_inputs: end the pass once every input was seen.

    Returns:
        The layer's output, (N, L, D), at least float32 (None when stopped), and the inputs by name.
    """
    wanted = inputs_of or {}
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = args[0].detach()
            if stop_after_inputs and len(seen) == len(wanted):
                raise _Stop

        return hook

    handles = [module.register_forward_pre_hook(look(name)) for name, module in wanted.items()]
    dtype = next(layer.parameters()).dtype
    output: Any = None
    try:
        with ExitStack() as stack:
            if autocast is not None:
                stack.enter_context(layer_norms_in_own_type(layer))
            for module in zeroed:
                stack.enter_context(replaced_forward(module, _zeros_of(module)))
            stack.enter_context(
                torch.autocast(hidden.device.type, autocast, enabled=autocast is not None)
            )
            stack.enter_context(suppress(_Stop))
            given = hidden if autocast is not None else hidden.to(dtype)
            output = layer(given, *extra[0], **extra[1])
    finally:
        for handle in handles:
            handle.remove()
    if isinstance(output, tuple | list):
        output = output[0]
    return (None if output is None else wide(output)), seen
