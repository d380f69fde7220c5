"""The config of a slimmed model: every field of its base config, and what its blocks are.

In a file without model classes, so that reading a config.json needs none of them: `import
llmslim` teaches transformers the model type through this file alone.

These files travel inside checkpoints: they import torch and transformers only.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .compat import class_of_transformers

FORMAT = 1
MODEL_TYPE = "llmslim"


class SlimConfig(PreTrainedConfig):
    """Factory for slim configs, as AutoConfig uses it."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return an instance of the slim subclass of the base config class.

        Raises:
            ValueError: if the dictionary is not a slim config that this version can read.
        """
        slim = config_dict.get("llmslim")
        base_type = config_dict.get("base_model_type")
        if not isinstance(slim, dict) or not isinstance(base_type, str):
            raise ValueError(
                "config.json: not a llmslim config; it must have `llmslim` and `base_model_type`"
            )
        if slim.get("format") != FORMAT:
            raise ValueError(
                f"config.json: llmslim format {slim.get('format')!r}; this version reads {FORMAT}. "
                "Install a newer llmslim."
            )
        if base_type == MODEL_TYPE or base_type not in CONFIG_MAPPING:
            raise ValueError(
                f"config.json: base_model_type {base_type!r} is not known to this transformers. "
                "Install a newer transformers."
            )
        base = CONFIG_MAPPING[base_type]
        config = slim_config_class(base).from_dict(config_dict, **kwargs)
        from .base_class import base_class_of, model_classes

        if not model_classes(base):  # a part that no Auto class lists; its name is all there is
            from .modeling_llmslim import slim_model_class

            given = config[0] if isinstance(config, tuple) else config
            slim_model_class(base_class_of(given))
        return config


_classes: dict[type, Any] = {}


def slim_config_class(base: type[PreTrainedConfig]) -> Any:
    """Return the slim subclass of a config class, known to the Auto classes."""
    if getattr(base, "base_model_type", ""):  # slim already: two models share a config
        return base
    if base in _classes:
        return _classes[base]
    cls = _classes[base] = type(
        f"Slim{base.__name__}",
        (base,),
        {
            "__module__": __name__,
            "__doc__": f"{base.__name__} of a model with slim blocks.",
            "model_type": MODEL_TYPE,
            "base_model_type": base.model_type,
        },
    )
    # Only a model class needs the rest, and importing it first would import it in a circle.
    from .base_class import model_classes
    from .modeling_llmslim import slim_model_class

    for name, classes in model_classes(base).items():
        slim = tuple(slim_model_class(each, base) for each in classes)
        getattr(transformers, name).register(cls, slim, exist_ok=True)
    return cls


def __getattr__(name: str) -> Any:
    """Return a slim config class by its name, which unpickling needs; made on first use.

    Raises:
        AttributeError: if transformers has no class to derive it from.
    """
    if name.startswith("Slim"):
        return slim_config_class(class_of_transformers(name[4:], PreTrainedConfig))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Teach AutoConfig the model type `llmslim`, and through its configs the other Auto classes."""
    AutoConfig.register(MODEL_TYPE, SlimConfig, exist_ok=True)


# The package's own file registers itself on import, whichever import comes first; the copy inside
# a checkpoint must not: there the user decides by `trust_remote_code`, each time.
if __name__ == "llmslim.modeling.configuration_llmslim":
    register()
