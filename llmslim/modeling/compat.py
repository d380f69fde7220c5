"""What the modeling files use of transformers beside its documented interface.

Everything of that kind is in this file, or in `llmslim/compat.py` where only the installed package
needs it; `tests/test_compat.py` holds each of them against the transformers that is installed.

These files travel inside checkpoints: they import torch and transformers only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN

ACTIVATIONS: Any = ACT2FN
"""transformers' activations by the names that configs use; it exports no other table of them."""
INITIALIZED = "_is_hf_initialized"
"""Mark of a module or tensor that loading must draw no weights into."""
_EXPERTS_LOOP = "_experts_implementation_internal"


def mark_initialized(item: Any) -> None:
    """Keep transformers from drawing new weights into a module or tensor, in place.

    Loading initialises every module that is not marked, also where no weight of it is missing.
    """
    setattr(item, INITIALIZED, True)


class Initialized:
    """Base of modules that are always marked as `mark_initialized` does: in a class, to stay."""

    _is_hf_initialized = True


def build_from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
    """Return a model of a class; only Auto classes have a public method that does so.

    Args:
        cls: a model class.
        config: of it.
        **kwargs: `dtype` and the like.
    """
    return cls._from_config(config, **kwargs)


def model_mapping(auto: Any) -> Any:
    """Return the model classes that an Auto class knows, by config class: one, or a tuple."""
    return auto._model_mapping


def with_plain_experts(config: Any) -> Any:
    """Return a config whose experts are run one by one; the same one where they are already.

    The public setter changes a whole model, and later calls of it would undo the choice.
    """
    if getattr(config, _EXPERTS_LOOP, "eager") == "eager":
        return config
    config = copy.copy(config)
    object.__setattr__(config, _EXPERTS_LOOP, "eager")
    return config


def place_buffers(block: nn.Module) -> None:
    """Give a block real buffers, in place, where only parameters are to be on the meta device.

    transformers builds all of a model on the meta device; vLLM's Transformers backend has new
    tensors in memory, moves the parameters alone, and loads what the files hold into both.
    """
    if torch.get_default_device().type == "meta":
        return
    for module in block.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device=torch.get_default_device()))


_apart: dict[tuple[type, frozenset[str]], type] = {}


def keep_apart(model: Any, names: Iterable[str]) -> None:
    """Give modules that hold blocks classes of their own, in place, where vLLM builds the model.

    Its Transformers backend looks at one module of a class, and then joins projections in all of
    that class whose parts have the same names, whatever these parts are.

    Args:
        model: on its way to be a slim model.
        names: of its blocks.
    """
    if getattr(model.config, "_attn_implementation", None) not in ("vllm", "vllm_mla"):
        return
    holders: dict[str, set[str]] = {}
    for name in names:
        holder, _, leaf = name.rpartition(".")
        holders.setdefault(holder, set()).add(leaf)
    for holder, leaves in holders.items():
        module = model.get_submodule(holder)
        if module is not model:
            cls = type(module)
            own = _apart.setdefault((cls, frozenset(leaves)), type(cls.__name__, (cls,), {}))
            module.__class__ = own


def class_of_transformers(name: str, kind: type) -> Any:
    """Return a class that transformers exports.

    Raises:
        AttributeError: if it exports none of that name which derives from `kind`.
    """
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, kind):
        raise AttributeError(f"transformers has no {kind.__name__} {name!r}")
    return found
