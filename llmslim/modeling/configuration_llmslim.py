"""The config of a slimmed model: every field of its base config, and what its blocks are.

In a file without model classes, so that reading a config.json needs none of them: `import
llmslim` teaches transformers the model type through this file alone.

These files travel inside checkpoints: they import torch and transformers only.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

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
        return slim_config_class(CONFIG_MAPPING[base_type]).from_dict(config_dict, **kwargs)


_classes: dict[type, Any] = {}


def slim_config_class(base: type[PreTrainedConfig]) -> Any:
    """Return the slim subclass of a config class, known to the Auto classes."""
    if base in _classes:
        return _classes[base]
    cls = type(
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
    from transformers import AutoModelForCausalLM

    from .base_class import auto_classes, listed_classes
    from .modeling_llmslim import SlimForCausalLM

    known = auto_classes(base)
    for auto in known.values() or (AutoModelForCausalLM,):
        factory: Any = SlimForCausalLM
        if known:  # pipelines look for the model's own name among those that are registered
            name = f"Slim{next(listed_classes(auto, base)).__name__}"
            factory = type(name, (SlimForCausalLM,), {"__module__": __name__})
        auto.register(cls, factory, exist_ok=True)
    _classes[base] = cls
    return cls


def register() -> None:
    """Teach AutoConfig the model type `llmslim`, and through its configs the other Auto classes."""
    AutoConfig.register(MODEL_TYPE, SlimConfig, exist_ok=True)


# The package's own file registers itself on import, whichever import comes first; the copy inside
# a checkpoint must not: there the user decides by `trust_remote_code`, each time.
if __name__ == "llmslim.modeling.configuration_llmslim":
    register()
