"""Every architecture that reads images or sound besides text, tiny: as `every_architecture`.

What is in transformers' mapping of image-text-to-text or of multimodal models. Nothing is
downloaded. Used by test_multimodal.py, and by benchmarks/architectures.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from every_architecture import MLP_AND_ATTENTION, logits, tiny_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llmslim
from llmslim import fitting, planning
from llmslim.modeling.base_class import auto_class_of, auto_classes

LISTED = {
    **AutoModelForMultimodalLM._model_mapping._model_mapping,
    **AutoModelForImageTextToText._model_mapping._model_mapping,
}
"""Class names by model type."""


def _rope(*sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": list(sections)}


_MROPE = {"text_config": {"rope_parameters": _rope(2, 3, 3)}}
_KOSMOS = {"layers": 2, "embed_dim": 64, "ffn_dim": 96, "attention_heads": 4}
_PARTS: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "cosmos3_edge": _MROPE,
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
    },
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _rope(3, 3, 2)}},
    "florence2": {
        "vision_config": {"embed_dim": [16, 32, 32, 64], "depths": [1, 1, 1, 1]},
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "glm46v": _MROPE,
    "glm4v": _MROPE,
    "glm4v_moe": {"text_config": {"rope_parameters": _rope(1, 1, 2)}},
    "glm5_next": {"text_config": {"index_kpool": 4}},
    "glm_ocr": _MROPE,
    "glmga": _MROPE,
    "granite_docling": {"vision_config": {"out_hidden_size": 64}},
    "granite_speech": {"encoder_config": {"hidden_dim": 64, "num_heads": 4, "dim_head": 16}},
    "granite_speech_plus": {"encoder_config": {"hidden_dim": 64, "num_heads": 4, "dim_head": 16}},
    "hunyuan_vl": {"text_config": {"head_dim": 16, "rope_parameters": _rope(2, 2, 2, 2)}},
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "janus": {
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 64}
    },
    "kosmos-2": {"text_config": _KOSMOS},
    "kosmos-2.5": {"text_config": _KOSMOS},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark": {
        "audio_config": {"out_hidden_size": 64, "hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4},
        "out_hidden_size": 64,
        "projector_hidden_size": 64,
    },
    "paddleocr_vl": _MROPE,
    "qwen2_5_omni_thinker": _MROPE,
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": {
        **_MROPE,
        "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4},
    },
    "step3p7": {"text_config": {"sliding_window": 8}},
    "vibevoice_asr": {
        part: {"num_filters": 4, "depths": [1] * 7}
        for part in ("acoustic_tokenizer_encoder_config", "semantic_tokenizer_encoder_config")
    },
}
"""Sizes that only these have, or that must fit each other, by model type and part."""


def config_classes() -> dict[str, Any]:
    """Return the config class of every entry of either mapping, by model type."""
    return {name: CONFIG_MAPPING[name] for name in LISTED}


def of_images_or_sound() -> dict[str, Any]:
    """Return the config classes of what the causal mapping does not list as the same class."""
    causal = AutoModelForCausalLM._model_mapping._model_mapping
    return {name: cls for name, cls in config_classes().items() if causal.get(name) != LISTED[name]}


def default_config(name: str) -> Any:
    """Return an architecture's default config, naming the class that reads more than text."""
    config = CONFIG_MAPPING[name]()
    config.architectures = [LISTED[name]]
    return config


def tiny_multimodal_config(name: str) -> Any:
    """Return a config with few and small layers, of the class that reads more than text."""
    config = tiny_config(CONFIG_MAPPING[name], _PARTS.get(name, {}))
    config.architectures = [LISTED[name]]
    return config


def tiny_multimodal(name: str) -> Any:
    """Return a random tiny model in evaluation mode, no bias or norm of it neutral.

    Raises:
        Exception: whatever its code raises where it cannot be built from its config alone.
    """
    config = tiny_multimodal_config(name)
    torch.manual_seed(0)
    model = auto_class_of(config).from_config(config).eval()
    assert type(model).__name__ == LISTED[name]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def answer(model: Any) -> torch.Tensor | None:
    """Return the logits of some text; None of a model that answers to no text alone."""
    try:
        return logits(model)
    except (TypeError, ValueError):
        return None


def round_trip(model: Any) -> None:
    """Slim a model, save it, and load it with every Auto class that the source loads with.

    Args:
        model: is slimmed in place.

    Raises:
        AssertionError: if something does not hold.
    """
    dense, count = answer(model), sum(p.numel() for p in model.parameters())
    known = auto_classes(type(model.config))
    planned = planning.plan(model, MLP_AND_ATTENTION)
    report = fitting.rewrite(model, planned)
    assert report.totals == planned.report().totals
    assert report.totals.params_before == count
    assert report.totals.params_after == sum(p.numel() for p in model.parameters()) < count
    slim = answer(model)
    assert slim is None or not torch.allclose(slim, dense), "the blocks are not used"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for auto in known.values():
            loaded = auto.from_pretrained(folder)
            assert type(loaded) is type(model)
            ours, theirs = model.state_dict(), loaded.state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
            torch.testing.assert_close(answer(loaded), slim, rtol=1e-4, atol=1e-4)


def convert_trip(name: str, folder: Path) -> tuple[str, ...]:
    """Convert a tiny model's folder; what is written must be what `slim` makes in memory.

    Args:
        name: model type.
        folder: empty.

    Returns:
        What the report says besides.

    Raises:
        AssertionError: if something does not hold.
    """
    tiny_multimodal(name).save_pretrained(folder / "dense")
    (folder / "dense" / "preprocessor_config.json").write_text("{}")
    report = llmslim.convert(folder / "dense", MLP_AND_ATTENTION, folder / "slim").report
    model = llmslim.load(folder / "dense")
    assert type(model).__name__ == LISTED[name]
    known = auto_classes(type(model.config))
    llmslim.slim(model, MLP_AND_ATTENTION)
    ours = model.state_dict()
    for auto in known.values():
        loaded = auto.from_pretrained(folder / "slim")
        assert type(loaded).__name__ == f"Slim{LISTED[name]}"
        theirs = loaded.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        torch.testing.assert_close(answer(loaded), answer(model), rtol=1e-4, atol=1e-4)
    assert llmslim.verify(folder / "slim").ok
    assert (folder / "slim" / "preprocessor_config.json").read_text() == "{}"
    return report.problems
