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
from collections.abc import Iterator, Mapping, Sequence
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
    places = {old: new for new, old in enumerate(keep)}
    moves = [
        (module, name, _moved(value, old, name, places))
        for old in keep
        for module in layers[old].modules()
        for name, value in layer_indices(module)
    ]
    parent, _, leaf = stack.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ModuleList(layers[old] for old in keep))
    for module, name, index in moves:
        setattr(module, name, index)


def layer_indices(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the attributes of a module that hold the index of a decoder layer, with their values."""
    for name, value in vars(module).items():
        if _INDEX.search(name) and type(value) is int:
            yield name, value


def _moved(value: int, own: int, name: str, places: Mapping[int, int]) -> int:
    """Return the new value of an attribute that holds the index of a layer.

    Raises:
        ValueError: if there is none.
    """
    named_alone = _INDEX.match(name) is not None  # `layer_idx`, not `kv_shared_layer_index`
    if named_alone and value != own:
        raise ValueError(f"layer {own} calls itself {name} {value}")
    if value not in places:
        raise ValueError(f"layer {own} reads from layer {value} ({name}), which is dropped")
    return places[value]


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
    for key, value in fields.items():
        real = config.attribute_map.get(key, key)
        if not hasattr(config, real):
            raise AttributeError(f"config has no field {key!r}")
        object.__setattr__(config, real, value)


def text_configs(model: Any) -> list[PreTrainedConfig]:
    """Return the text config of a model, and every copy of it that its modules keep."""
    text = model.config.get_text_config()
    found = {id(text): text}
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            own = config.get_text_config()
            if type(own) is type(text):
                found.setdefault(id(own), own)
    return list(found.values())


def set_attributes(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Set plain attributes of a module that it has already, in place.

    Raises:
        AttributeError: if it has none of one of the names.
    """
    for name, value in values.items():
        if name not in vars(module) or isinstance(vars(module)[name], dict):
            raise AttributeError(f"{type(module).__name__} has no attribute {name!r}")
        setattr(module, name, value)
