"""Run a model without its weights, and note what each decoder layer computes.

Some layers look at their own index when they run. What an operation is given beside tensors (the
number it multiplies by, the axis it sums over) and the tensors' shapes can be seen on the meta
device; so two layers whose notes are equal compute the same with the same weights and inputs.

A few operations ask for values, which tensors on the meta device do not have. They are given an
answer that every layer gets alike.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_TOKENS = 4
_aten = torch.ops.aten


class CannotRunError(Exception):
    """This model does not run without weights; the text says why."""


def layer_operations(model: Any, stack: str) -> list[tuple[list[Any], list[Any]]]:
    """Return what each decoder layer computes when the model reads text.

    Args:
        model: a causal language model on the meta device.
        stack: name of the list of its decoder layers.

    Returns:
        For each layer the operations in it, and those between it and the next one; comparable with
        `==`. What comes before the first layer and after the last one is left out.

    Raises:
        CannotRunError: if its code asks for more than shapes.
    """
    layers: Any = model.get_submodule(stack)
    notes = _run(model, layers)
    found = [(notes.inside[index], notes.after[index]) for index in range(len(layers))]
    found[-1] = (found[-1][0], [])
    return found


def check_runs(model: Any, *, use_cache: bool = False) -> None:
    """Run a model on the meta device.

    Args:
        model: a causal language model.
        use_cache: whether it fills a cache, as it does when it generates.

    Raises:
        CannotRunError: if its code raises.
    """
    _run(model, (), use_cache)


def _run(model: Any, layers: Iterable[nn.Module], use_cache: bool = False) -> _Notes:
    notes = _Notes()
    training = model.training
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            enter = partial(notes.turn_to, notes.inside[index])
            leave = partial(notes.turn_to, notes.after[index])
            stack.callback(layer.register_forward_pre_hook(enter).remove)
            stack.callback(layer.register_forward_hook(leave).remove)
        stack.callback(model.train, training)
        model.eval()
        for context in (torch.no_grad(), torch.device("meta"), notes):
            stack.enter_context(context)
        try:
            model(input_ids=ids, use_cache=use_cache)
        except Exception as error:  # each architecture fails in its own way
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise CannotRunError(text) from error
    return notes


class _Notes(TorchDispatchMode):
    """Notes operations, those in each layer and after it apart."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside: dict[int, list[Any]] = defaultdict(list)
        self.after: dict[int, list[Any]] = defaultdict(list)
        self._now: list[Any] = []

    def turn_to(self, notes: list[Any], *_: Any) -> None:
        """Note what comes in another list."""
        self._now = notes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, or answer for it, and note it."""
        kwargs = kwargs or {}
        self._now.append((str(func), *map(_noted, itertools.chain(args, kwargs.items()))))
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and first.is_meta:
            if func is _aten._local_scalar_dense.default:
                return True if first.dtype == torch.bool else 1
            if func is _aten.nonzero.default:
                return first.new_empty(2, first.dim(), dtype=torch.long)
            if func is _aten._grouped_mm.default:  # takes bfloat16 only, there
                return first.new_empty(*first.shape[:-1], args[1].shape[-1])
        return func(*args, **kwargs)


def _noted(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_noted, value))
    return value
