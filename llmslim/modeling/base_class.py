"""Which of transformers' Auto classes a config is loaded with, and which class that gives.

A model that reads images or sound besides text is listed under other Auto classes than one of
text alone, some under both: `Llama4Config` is a `Llama4ForCausalLM` to `AutoModelForCausalLM`,
its text part, and a `Llama4ForConditionalGeneration` to `AutoModelForImageTextToText`. The
`architectures` of its config name the one that a checkpoint holds.

These files travel inside checkpoints: they import torch and transformers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from .compat import model_mapping
from .depth import plain_class

_NAMES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
)
"""Auto classes of models that write text, in the order in which they are tried."""
_LAST = _NAMES[-1]


def auto_classes(config_class: type) -> dict[str, Any]:
    """Return the Auto classes that find a model for a base config class, by name.

    Encoder-decoder models of text alone have a class of another kind there, and are left out; what
    reads sound into a decoder is at times listed among them, and nowhere else.

    Args:
        config_class: one of transformers' own.

    Example:
        >>> list(auto_classes(transformers.LlavaConfig))
        ['AutoModelForImageTextToText', 'AutoModelForMultimodalLM']
    """
    found: dict[str, Any] = {}
    for name in _NAMES:
        auto = getattr(transformers, name, None)
        if auto is None or config_class not in model_mapping(auto):
            continue
        if name == _LAST and (
            found or "text_config" not in getattr(config_class, "sub_configs", {})
        ):
            continue
        found[name] = auto
    return found


def auto_class_of(config: Any, *, trust_remote_code: bool = False) -> Any:
    """Return the Auto class that loads, or builds, the class that a config names.

    Args:
        config: of any model; where its `architectures` is empty, the first Auto class that knows
            its type counts.
        trust_remote_code: whether code that comes with it is to be used.
    """
    named = getattr(config, "auto_map", None) or {}
    if trust_remote_code and (brought := [name for name in _NAMES if name in named]):
        return getattr(transformers, brought[0])
    known = auto_classes(plain_class(config))
    finds = _that_find(config, plain_class(config), known)
    return known[finds[0]] if finds else next(iter(known.values()), AutoModelForCausalLM)


def auto_class_name(config: Any) -> str:
    """Return the name of the most specific Auto class for what a model reads.

    Args:
        config: of a slim or an ordinary model.
    """
    slim = hasattr(config, "base_model_type")
    config_class = plain_class(config).__bases__[0] if slim else plain_class(config)
    finds = _that_find(config, config_class, auto_classes(config_class))
    specific = [name for name in finds if name != _NAMES[0]]
    return next(iter(specific + finds), str(auto_class_of(config).__name__))


def _that_find(config: Any, config_class: type, autos: dict[str, Any]) -> list[str]:
    """Return the names of the Auto classes that list the class which a config names."""
    wanted = str((getattr(config, "architectures", None) or [""])[0])
    wanted = wanted.removeprefix("Slim") if hasattr(config, "base_model_type") else wanted
    return [
        name
        for name, auto in autos.items()
        if any(cls.__name__ == wanted for cls in listed_classes(auto, config_class))
    ]


def base_class_of(config: Any) -> type[PreTrainedModel]:
    """Return the class that a slim model was made from.

    Args:
        config: a slim config: with `base_model_type`, and `architectures` of one name.

    Raises:
        ValueError: if this transformers has no such class.
    """
    config_class = CONFIG_MAPPING[config.base_model_type]
    name = str((config.architectures or [""])[0]).removeprefix("Slim")
    listed = [
        cls
        for auto in auto_classes(config_class).values()
        for cls in listed_classes(auto, config_class)
    ]
    for cls in listed:
        if cls.__name__ == name:
            return cls
    # The text part of a config that is listed (Emu3, Mllama).
    base: Any = getattr(transformers, name, None)
    if getattr(base, "config_class", None) is config_class and issubclass(base, PreTrainedModel):
        part: type[PreTrainedModel] = base
        return part
    if listed:
        return listed[0]
    raise ValueError(
        f"config.json: architectures {config.architectures}: no language model of "
        f"{config.base_model_type} that this transformers knows"
    )


def model_classes(config_class: type) -> dict[str, tuple[type[PreTrainedModel], ...]]:
    """Return the classes that a slim model of a config can be loaded as, by Auto class.

    Args:
        config_class: one of transformers' own.

    Returns:
        Under each Auto class of models that write text all of those, its own first: which one it
        gives is for a config's `architectures` to say. Then the bare model, and the classifier.

    Example:
        >>> {name: [cls.__name__ for cls in classes] for name, classes
        ...  in model_classes(transformers.LlavaConfig).items()}["AutoModel"]
        ['LlavaModel']
    """
    texts = {name: _of(auto, config_class) for name, auto in auto_classes(config_class).items()}
    every = dict.fromkeys(cls for classes in texts.values() for cls in classes)
    found = {name: tuple(dict.fromkeys((*classes, *every))) for name, classes in texts.items()}
    others = {auto.__name__: _of(auto, config_class) for auto in _HEADLESS}
    return {name: classes for name, classes in (found | others).items() if classes}


_HEADLESS = (AutoModel, AutoModelForSequenceClassification)
"""Auto classes of what writes no text, and is loaded from the same files all the same."""


def _of(auto: Any, config_class: type) -> tuple[type[PreTrainedModel], ...]:
    """Return an Auto class's classes for a config, without those of a part of it.

    Some types have a config of their own and another type's classes: InternLM3's are Llama's.
    """
    if config_class not in model_mapping(auto):
        return ()
    parts = (getattr(config_class, "sub_configs", None) or {}).values()
    listed = listed_classes(auto, config_class)
    return tuple(cls for cls in listed if getattr(cls, "config_class", None) not in parts)


def listed_classes(auto: Any, config_class: type) -> Iterator[type[PreTrainedModel]]:
    """Yield the classes that an Auto class has for a config class; the first is the usual one.

    Args:
        auto: knows that config class.
        config_class: one of transformers' own.
    """
    found = model_mapping(auto)[config_class]
    yield from found if isinstance(found, tuple | list) else (found,)
