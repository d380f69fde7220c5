"""Compare two models without looking at their weights: do they compute the same with the same ones?

Two modules do if they run the same code on equal settings: the same `forward`, parameters and
buffers of the same names and shapes, equal plain attributes, and modules inside that do. This is
how a plan makes sure, on the meta device, that the config it ends in builds the model that surgery
makes.

Left out: values of buffers, which tensors on the meta device do not have. What a checkpoint holds
is compared by its values when it is read back.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmslim.compat import (
    CONFIG_ORIGIN,
    LOADING_MARKS,
    TIED_WEIGHTS,
    attention_of,
    unstored_buffers,
)

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size)
_SKIPPED = {
    # What torch and transformers keep account of while a model is built and loaded; of a model,
    # also what has a name of its own (`_`).
    *vars(nn.Module()),
    *(*LOADING_MARKS, "name_or_path", "warnings_issued"),
}
_UNUSED_FIELDS = {
    # Fields of configs that no forward pass reads.
    *("architectures", "auto_map", "base_model_type", "dtype", "llmslim", "model_type"),
    *(*CONFIG_ORIGIN, "torch_dtype"),
}


_Known = dict[tuple[int, int], bool]
"""Whether two configs are equal, by their ids."""


def first_difference(one: nn.Module, other: nn.Module) -> str:
    """Return what two models would compute differently with the same weights.

    Args:
        one: a model, on any device.
        other: another one.

    Returns:
        The first difference as `module: what`, empty if there is none.
    """
    ours, theirs = (dict(model.named_modules(remove_duplicate=False)) for model in (one, other))
    known: _Known = {}
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        found = [f"{name}: in one of the two only"]
        if name in ours and name in theirs:
            found = list(_differences(name or type(one).__name__, ours[name], theirs[name], known))
        if found:
            return found[0]
    return ""


def differences(
    where: str, one: nn.Module, other: nn.Module, *, attributes: bool = True
) -> Iterator[str]:
    """Yield what two modules would compute differently, without the modules inside them.

    Args:
        where: their name, for the sentences.
        one: a module.
        other: the one it is compared with.
        attributes: whether plain attributes count.
    """
    yield from _differences(where, one, other, {} if attributes else None)


def _differences(
    where: str, one: nn.Module, other: nn.Module, known: _Known | None
) -> Iterator[str]:
    if type(one).forward is not type(other).forward:
        yield f"{where}: {type(one).__name__} and {type(other).__name__}"
    unstored = unstored_buffers(one) | unstored_buffers(other)
    for kind in (nn.Module.named_parameters, nn.Module.named_buffers):
        x, y = ({k: _form(t) for k, t in kind(each, recurse=False)} for each in (one, other))
        for key in sorted({*x, *y}):
            if key in unstored and not (key in x and key in y):
                continue  # worked out from the config, which is compared
            if x.get(key, "missing") != y.get(key, "missing"):
                yield f"{where}: {key} {x.get(key, 'missing')} and {y.get(key, 'missing')}"
    for key, ours, theirs in () if known is None else changed_attributes(one, other, known):
        yield f"{where}: {key} {_short(ours)} and {_short(theirs)}"


def changed_attributes(
    one: nn.Module, other: nn.Module, known: _Known | None = None
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the plain attributes that two modules have both, and that differ.

    What only one has is not compared: code that needs it does not run without it.

    Args:
        one: a module.
        other: the one it is compared with.
        known: takes up which configs are equal, for other modules that have the same ones.
    """
    known = {} if known is None else known
    ours, theirs = (_attributes(module) for module in (one, other))
    for key, value in ours.items():
        if key in theirs and not _equal(value, theirs[key], known):
            yield key, value, theirs[key]


def _attributes(module: nn.Module) -> dict[str, Any]:
    whole = isinstance(module, PreTrainedModel)
    return {
        key: value
        for key, value in vars(module).items()
        if key not in _SKIPPED and not (whole and key.startswith("_") and key != TIED_WEIGHTS)
    }


def _equal(a: Any, b: Any, known: _Known) -> bool:
    """Return whether two attributes are equal; those that are no plain data always are."""
    if isinstance(a, PreTrainedConfig) and isinstance(b, PreTrainedConfig):
        pair = id(a), id(b)
        if pair not in known:
            known[pair] = bool(_fields(a) == _fields(b))
        return known[pair]
    if isinstance(a, _PLAIN) or isinstance(b, _PLAIN):
        return bool(a == b) or (a != a and b != b)  # NaN, too
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y, known) for x, y in zip(a, b, strict=True))
    if type(a) is not type(b):
        return False
    if isinstance(a, set | frozenset):
        return bool(a == b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key], known) for key in a)
    if isinstance(a, FunctionType):
        return a.__code__ is b.__code__ and _equal(_closed_over(a), _closed_over(b), known)
    if isinstance(a, torch.Tensor):
        return bool(a.shape == b.shape and a.dtype == b.dtype)
    return True


def _closed_over(function: FunctionType) -> list[Any]:
    cells = function.__closure__ or ()
    return [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, _PLAIN)]


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a config and of the configs inside it."""
    values = {**config.to_dict(), "attention": attention_of(config)}
    return {
        key: {k: v for k, v in value.items() if k not in _UNUSED_FIELDS}
        if isinstance(value, dict)
        else value
        for key, value in values.items()
        if key not in _UNUSED_FIELDS
    }


def _form(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} of {tensor.dtype}"


def _short(value: Any) -> str:
    text = "another config" if isinstance(value, PreTrainedConfig) else repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
