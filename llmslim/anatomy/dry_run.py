"""Run a model on the meta device and record what each decoder layer computes.

Some layers use their own index when they run. The arguments of an operation beside tensors (the
number it multiplies by, the axis it sums over) and the tensors' shapes are visible on the meta
device, so two layers with equal records compute the same with the same weights and inputs.

A few operations need values, which tensors on the meta device do not have. They get the same answer
in every layer.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmslim.compat import (
    GROUPED_PRODUCT,
    READ_NUMBER,
    TorchDispatchMode,
    returns_a_new_tensor,
)

_TOKENS = 4
_FOUND = 2
"""As many elements of a tensor count as not zero."""


class CannotRunError(Exception):
    """This model does not run without weights; the message names the reason."""


@dataclass(frozen=True)
class Operations:
    """Everything that a model computes up to the end of the last decoder layer."""

    before: list[Any]
    """Operations before the first layer."""
    inside: list[list[Any]]
    """Those in each layer."""
    between: list[list[Any]]
    """Those between each layer and the next one."""


def layer_operations(
    model: Any, stack: str, *, use_cache: bool = False, one_more: bool = False
) -> Operations:
    """Return what a model computes when it reads text.

    Args:
        model: a causal language model on the meta device.
        stack: name of the list of its decoder layers.
        use_cache: fill a cache, as models do when they generate.
        one_more: read one more token with that cache, and return what is computed then.

    Returns:
        What each operation is given beside tensors, and their shapes; comparable with `==`.

    Raises:
        CannotRunError: if its code needs more than shapes.
    """
    layers: Any = model.get_submodule(stack)
    notes = _Notes()
    training = model.training
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    with ExitStack() as context:
        for index, layer in enumerate(layers):
            enter = partial(notes.turn_to, notes.inside, index)
            leave = partial(notes.turn_to, notes.after, index)
            context.callback(layer.register_forward_pre_hook(enter).remove)
            context.callback(layer.register_forward_hook(leave).remove)
        context.callback(model.train, training)
        model.eval()
        for each in (torch.no_grad(), torch.device("meta"), notes):
            context.enter_context(each)
        try:
            given = model(input_ids=ids, use_cache=use_cache)
            if one_more:
                notes.forget()
                model(input_ids=ids[:, :1], past_key_values=given.past_key_values, use_cache=True)
        except Exception as error:  # each architecture fails in its own way
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise CannotRunError(text) from error
    count = len(layers)
    return Operations(
        before=notes.after[-1],
        inside=[notes.inside[index] for index in range(count)],
        between=[notes.after[index] for index in range(count - 1)],
    )


class _Notes(TorchDispatchMode):
    """Records operations, separately inside each layer and after it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside: dict[int, list[Any]] = defaultdict(list)
        self.after: dict[int, list[Any]] = defaultdict(list)
        self._now = self.after[-1]

    def turn_to(self, notes: dict[int, list[Any]], index: int, *_: Any) -> None:
        """Record what follows for another place."""
        self._now = notes[index]

    def forget(self) -> None:
        """Start with empty records."""
        self.inside.clear()
        self.after.clear()
        self._now = self.after[-1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, or answer for it, and note it."""
        kwargs = kwargs or {}
        self._now.append((str(func), *map(_noted, itertools.chain(args, kwargs.items()))))
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and first.is_meta:
            if func is READ_NUMBER:
                return True if first.dtype == torch.bool else 1
            if func is torch.ops.aten.nonzero.default:
                return first.new_empty(_FOUND, first.dim(), dtype=torch.long)
            if func is torch.ops.aten.index.Tensor:
                args = first, _places(args[1])
            if func is GROUPED_PRODUCT:  # takes bfloat16 only, there
                return first.new_empty(*first.shape[:-1], args[1].shape[-1])
        return _run(func, args, kwargs)


def _places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Return indices in place of masks: one tensor of places for each axis of a mask."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        else:
            found += [index.new_empty(_FOUND, dtype=torch.long)] * index.dim()
    return found


_KNOWN: dict[Any, tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = {}
"""Shape, strides and type of what operations returned, by the operation and its arguments."""
_KNOWN_AT_MOST = 4096


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an operation's result on the meta device; every layer but the first repeats it.

    There torch works out shapes in Python, which takes longer than most operations on numbers.
    """
    if not returns_a_new_tensor(func):
        return func(*args, **kwargs)
    try:
        key = func, _layout(args), _layout(tuple(kwargs.items()))
        known = _KNOWN.get(key)
    except TypeError:  # an argument that is no number, and no tensor on the meta device
        return func(*args, **kwargs)
    if known is not None:
        shape, strides, dtype = known
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    result = func(*args, **kwargs)
    if type(result) is Tensor and result.is_meta:
        if len(_KNOWN) == _KNOWN_AT_MOST:
            _KNOWN.clear()
        _KNOWN[key] = tuple(result.shape), result.stride(), result.dtype
    return result


def _layout(value: Any) -> Any:
    """Return all that a result's layout depends on, hashable.

    Raises:
        TypeError: of a tensor whose number may matter: not on the meta device, or of no dimension.
    """
    if isinstance(value, Tensor):
        if not value.is_meta or not value.dim():
            raise TypeError
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_layout, value))
    return type(value), value


def _noted(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_noted, value))
    return value
