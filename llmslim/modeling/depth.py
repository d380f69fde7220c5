"""Keep some of a model's decoder layers, computing what they computed in the original.

Most architectures build the same model from a config that counts fewer layers. Some do not: their
layers depend on their index or on the number of layers (a scale divided by either, dense layers
before sparse ones, attention in every eighth layer). Their checkpoints hold a record of the
original instead, as `llmslim.depth` in config.json:

    stack        name of the list of decoder layers
    keep         which layers of the original stay, in their order
    original     config fields as the original had them
    kept         the same fields as they are afterwards
    attributes   other attributes, outside the layers, that follow the new fields, by module

Loading builds the original, without weights, and takes the other layers out.

These files travel inside checkpoints: they import torch and transformers only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

_INDEX = re.compile(r"(^|_)(layer|block)_?(idx|id|index|number|num)$")
"""Attributes that hold the index of a decoder layer: the module's own, by which a cache is
addressed, or that of another layer whose keys and values it reads."""


def restore_original(config: PreTrainedConfig, record: Mapping[str, Any]) -> None:
    """Give a config the fields of the original that a record describes, in place.

    Raises:
        ValueError: if the record does not fit the config.
    """
    try:
        set_config(config.get_text_config(), record["original"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"config.json: llmslim.depth does not fit the model ({error})") from error


_TORCH_OWN = frozenset(vars(nn.Module()))
"""Attributes that torch keeps in every module."""


def build_kept(model: Any, record: Mapping[str, Any]) -> None:
    """Turn a freshly built original into the model that a record describes, in place.

    Raises:
        ValueError: if the record does not fit the model.
    """
    try:
        drop_layers(model, record["stack"], record["keep"])
        set_fields(model, record["kept"])
        for name, values in record["attributes"].items():
            set_attributes(model.get_submodule(name), values)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"config.json: llmslim.depth does not fit the model ({error})") from error


def drop_layers(model: Any, stack: str, keep: Sequence[int]) -> None:
    """Keep only the given decoder layers of a model, in place; configs are not touched.

    Args:
        model: a causal language model.
        stack: name of the list of its decoder layers.
        keep: indices that stay, in their new order.

    Raises:
        ValueError: if a layer that stays reads from one that does not, or does not know its own
            index.
    """
    layers = model.get_submodule(stack)
    known = [
        (old, module, name, value)
        for old, layer in enumerate(layers)
        for module in layer.modules()
        for name, value in vars(module).items()
        if type(value) is int and _INDEX.search(name)
    ]
    # Longcat's layers have two attentions each, which are counted through.
    own = [value for _, _, name, value in known if _INDEX.match(name)]
    each = max(1, (1 + max(own, default=0)) // len(layers))
    places = {old: new for new, old in enumerate(keep)}
    moves = []
    for old, module, name, value in known:
        if old not in places:
            continue
        index, part = divmod(value, each)
        if _INDEX.match(name) and old not in (index, value):
            raise ValueError(f"layer {old} calls itself {name} {value}")
        if index not in places and value != old:
            raise ValueError(f"layer {old} reads from layer {index} ({name}), which is dropped")
        moved = places[old] if value == old else places[index] * each + part
        moves.append((module, name, moved))
    parent, _, leaf = stack.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ModuleList(layers[old] for old in keep))
    for module, name, value in moves:
        setattr(module, name, value)


def set_fields(model: Any, fields: Mapping[str, Any]) -> None:
    """Set fields of a model's text config, in place, wherever its modules keep a copy of it.

    All at once: one at a time would fail the config's own check that lists are as long as the
    number of layers.

    Raises:
        AttributeError: if the config has no field of one of the names.
    """
    for config in text_configs(model):
        set_config(config, fields)


def set_config(config: PreTrainedConfig, fields: Mapping[str, Any]) -> None:
    """Set fields of one config, in place.

    Raises:
        AttributeError: if it has no field of one of the names.
    """
    derived = {}
    for key, value in fields.items():
        real = config.attribute_map.get(key, key)
        if not hasattr(config, real):
            raise AttributeError(f"config has no field {key!r}")
        given = getattr(type(config), real, None)
        if isinstance(given, property) or real in vars(type(config)).get(_CONSTANTS, ()):
            derived[real] = value
        else:
            object.__setattr__(config, real, value)
    for real, value in derived.items():  # once what they are worked out from is known
        if getattr(config, real) != value:
            _fix(config, real, value)


_CONSTANTS = "_llmslim_constants"


def _fix(config: PreTrainedConfig, name: str, value: Any) -> None:
    """Give a config a value that its class works out from others, in place."""
    fixed = {**vars(type(config)).get(_CONSTANTS, {}), name: value}
    config.__class__ = cls = plain_class(config)
    fixed = {key: wanted for key, wanted in fixed.items() if getattr(config, key) != wanted}
    if fixed:
        names = {**fixed, _CONSTANTS: fixed, "__module__": cls.__module__}
        config.__class__ = type(cls.__name__, (cls,), names)


def plain_class(config: PreTrainedConfig) -> Any:
    """Return the class of a config, whatever values were fixed in it."""
    cls = type(config)
    return cls.__bases__[0] if _CONSTANTS in vars(cls) else cls


def text_configs(model: Any) -> list[PreTrainedConfig]:
    """Return the text config of a model, and every copy of it that its modules keep."""
    text = model.config.get_text_config()
    found = {id(text): text}
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            own = config.get_text_config()
            # A copy need not be of the class that the model's own was given since.
            if isinstance(text, plain_class(own)) or isinstance(own, plain_class(text)):
                found.setdefault(id(own), own)
    return list(found.values())


def set_attributes(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Set plain attributes of a module that it has already, in place.

    Raises:
        AttributeError: if it has none of one of the names.
    """
    for name, value in values.items():
        if name not in vars(module) or name in _TORCH_OWN:
            raise AttributeError(f"{type(module).__name__} has no attribute {name!r}")
        setattr(module, name, value)
