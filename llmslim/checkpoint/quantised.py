"""Weights that are stored quantised: unpacked where transformers can do so by itself, on a CPU.

What a block is fitted to are plain weights. fp8 and mxfp4 are unpacked on loading, GGUF has its own
way; all other formats need a library of their own, and most of them a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from llmslim.errors import CheckpointError

_UNPACKED: Mapping[str, Any] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}


def check_quantisation(config: Mapping[str, Any], given: str) -> None:
    """Refuse weights that cannot be unpacked here.

    Args:
        config: what config.json holds.
        given: the model, for messages.

    Raises:
        CheckpointError: if they are quantised in another way.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    for part in parts:
        name = _method(part)
        if name is not None and (name not in _UNPACKED or part is not config):
            raise CheckpointError(
                f"{given}: its weights are quantised ({name[:80]}); only plain weights, GGUF, "
                f"{' and '.join(_UNPACKED)} are read. Use the model it was quantised from, or, "
                "where the library that made it runs, load it with transformers, call "
                "model.dequantize() and model.save_pretrained(FOLDER), and give that folder."
            )


def unpacking(config: Any) -> Any:
    """Return the quantisation config to load with, None for plain weights.

    Args:
        config: the model's.
    """
    name = _method({"quantization_config": getattr(config, "quantization_config", None)})
    return None if name is None else _UNPACKED[name](dequantize=True)


def _method(config: Mapping[str, Any]) -> str | None:
    """Return the name of the method that a config names, None where it names none."""
    method = config.get("quantization_config")
    if not method:
        return None
    if isinstance(method, Mapping):
        method = method.get("quant_method")
    else:
        method = getattr(method, "quant_method", method)
    return str(getattr(method, "value", method))
