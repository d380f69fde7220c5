"""Tiny models of six layers, and configs that tell the kinds of layers by counters and indices.

Where a model has two or three layers, as in every_architecture.py, no rule on a layer's index has
room to go wrong. Nothing here is downloaded. Used by benchmarks/sweep.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from every_architecture import tiny_config
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS = 6
WINDOW = 4
"""Tokens that sliding attention sees: fewer than there are, or its layers are like all others."""
_WINDOWS = (
    *("sliding_window", "window_size", "sliding_window_size", "attention_window_size"),
    *("attention_chunk_size", "local_attention_window"),
)
_MIXED = ["sliding_attention", "full_attention", "full_attention"] * 2
_CONVOLUTIONS = ["conv", "full_attention", "conv", "conv", "full_attention", "conv"]
_TWICE = ["mamba", "hybrid", "mamba", "hybrid", "hybrid", "mamba"]
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}

BUILT: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 4]},
    "blenderbot": {"encoder_layers": 2, "decoder_layers": 6},
    "bloom": {"n_layer": 6},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "intermediate_size": [96] * 6,
        "layer_types": _MIXED,
        "activation_sparsity_pattern": [0.0] * 6,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 128,
    },
    "git": {"num_hidden_layers": 5},  # as many as its image encoder has would be another thing
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"] * 2},
    "hunyuan_v1_moe": {"head_dim": 16, "num_key_value_heads": 2, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": _CONVOLUTIONS, "num_hidden_layers": 6, "num_dense_layers": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mamba", "mlp", "moe"]},
    "recurrent_gemma": {"num_hidden_layers": 6},
    "whisper": {"decoder_layers": 6},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": _TWICE},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": _TWICE, "hybrid_layer_ids": [1, 3, 4]},
}  # fmt: skip
"""What six layers of an architecture need beside `tiny_config`, by model type."""
_SHARED = {"attention_hidden_size": 128, "attention_head_dim": 32}
BUILT["zamba"] |= _SHARED
BUILT["zamba2"] |= _SHARED
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
BUILT |= {
    name: {"text_config": {"rope_parameters": _MROPE}}
    for name in (
        *("cosmos3_edge", "glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl"),
        *("qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl"),
    )
}
BUILT |= {
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense", "sparse", "sparse"] * 2,
            "num_experts_per_tok": 2,
        }
    },
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [3, 3, 2],
            }
        }
    },
    "florence2": {
        "vision_config": {"embed_dim": [16, 32, 32, 64], "depths": [1, 1, 1, 1]},
    },
    "glm4v_moe": {"text_config": {"rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]}}},
    "glm5_next": {"text_config": {"index_kpool": 2}},
    "granite4_vision": {"deepstack_layer_map": [], "downsample_rate": "4/8"},
    "granite_docling": {"vision_config": {"out_hidden_size": 64}},
    "hunyuan_vl": {
        "text_config": {
            "head_dim": 16,
            "rope_parameters": {**_MROPE, "mrope_section": [2, 2, 2, 2]},
        }
    },
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "janus": {
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 64}
    },
    "kosmos-2.5": {
        "text_config": {"layers": 6, "embed_dim": 64, "ffn_dim": 96, "attention_heads": 4}
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [5, 3]}},
    "muse_spark": {
        "audio_config": {"out_hidden_size": 64, "hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4},
        "out_hidden_size": 64,
        "projector_hidden_size": 64,
    },
    "qwen2_vl": {
        "text_config": {"rope_parameters": _MROPE},
        "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4},
    },
    "step3p7": {"text_config": {"sliding_window": 4}},
}

RULES: dict[str, list[dict[str, Any]]] = {
    "afmoe": [{"num_dense_layers": 2}],
    "bamba": [{"attn_layer_indices": [0, 3, 5]}],
    "cohere2": [{"layer_types": _MIXED}],
    "deepseek_v2": [{"first_k_dense_replace": 2}],
    "deepseek_v3": [{"first_k_dense_replace": 2}],
    "dots1": [{"first_k_dense_replace": 2}],
    "ernie4_5_moe": [
        {"moe_layer_interval": 2, "moe_layer_start_index": 0},
        {"moe_layer_start_index": 2, "moe_layer_end_index": 4},
    ],
    "exaone4": [{"layer_types": _MIXED}],
    "flint": [{"mlp_only_layers": [0, 3]}, {"decoder_sparse_step": 2}],
    "gemma2": [{"layer_types": _MIXED}],
    "gemma3_text": [{"layer_types": _MIXED}],
    "gemma3n_text": [
        {"num_kv_shared_layers": 2},
        {"activation_sparsity_pattern": [0.95] * 3 + [0.0] * 3},
        {"intermediate_size": [96, 96, 64, 64, 96, 64]},
    ],
    "gemma4_text": [
        {"num_kv_shared_layers": 2, "layer_types": _MIXED},
        {"num_kv_shared_layers": 2, "layer_types": _MIXED, "use_double_wide_mlp": True},
        {"layer_types": _MIXED},
    ],
    "glm4v_moe": [{"text_config": {"first_k_dense_replace": 2}}],
    "glm4_moe": [{"first_k_dense_replace": 2}],
    "gpt2": [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ],
    "gpt_neo": [{"attention_types": [[["global", "local", "local"], 2]]}],
    "granite_swa": [{"layer_rope_theta": [0, 1e4, 1e2, 0, 1e4, 1e4]}],
    "granitemoe_swa": [{"layer_rope_theta": [0, 1e4, 1e2, 0, 1e4, 1e4]}],
    "hunyuan_v1_moe": [{"num_experts": 4, "moe_topk": [2, 1, 2, 1, 1, 2]}],
    "jamba": [
        {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2},
        {"attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 3},
    ],
    "laguna": [{"mlp_layer_types": ["dense", "sparse", "sparse"] * 2, "layer_types": _MIXED}],
    "lfm2": [{"layer_types": _CONVOLUTIONS}],
    "llama4_text": [
        {"interleave_moe_layer_step": 2},
        {"moe_layers": [1, 4]},
        {"no_rope_layers": [1, 0, 1, 1, 0, 1]},
    ],
    "mistral_large4": [
        {"text_config": {"kv_source_layers": [0, 1, 1, 3, 3, 5]}},
        {"text_config": {"no_rope_layers": [1, 0, 1, 1, 0, 1]}},
    ],
    "molmo2": [{"text_config": {"rope_scaling_layers": [1, 4]}}],
    "minicpm3": [{"scale_depth": 3.0}],
    "mistral4": [{"first_k_dense_replace": 2}],
    "mllama": [{"text_config": {"cross_attention_layers": [1, 4]}}],
    "modernbert-decoder": [{"layer_types": _MIXED}],
    "qwen2": [
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED},
    ],
    "qwen2_moe": [{"mlp_only_layers": [0, 3]}, {"decoder_sparse_step": 2}],
    "qwen3": [{"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED}],
    "qwen3_moe": [
        {"mlp_only_layers": [0, 3]},
        {"decoder_sparse_step": 2},
        {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ],
    "qwen3_vl_moe": [
        {"text_config": {"mlp_only_layers": [0, 3]}},
        {"text_config": {"decoder_sparse_step": 2}},
    ],
    "qwen3_next": [{"mlp_only_layers": [0, 3]}, {"decoder_sparse_step": 2}],
    "recurrent_gemma": [{"block_types": ["recurrent", "attention"]}],
    "rwkv": [{"rescale_every": 2}],
    "smollm3": [
        {"no_rope_layers": [1, 0, 1, 1, 0, 1]},
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED},
    ],
    "xlnet": [{"mem_len": 4}],
    "zamba2": [
        {"num_mem_blocks": 2},
        {"use_shared_attention_adapter": True, "num_mem_blocks": 2},
    ],
}
"""Configs in which a layer is what it is by its index or by the number of layers: what they set."""


_BY_IMAGES = ("mllama",)
"""Listed in both mappings; the causal class is saved with a config that no Auto class knows."""


@dataclass(frozen=True)
class Subject:
    """One model to be tried: an architecture, and the fields that its config sets."""

    model_type: str
    kind: str
    """`causal` or `image`: which Auto class builds it."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What tables call it."""
        fields = ", ".join(f"{key}={value}" for key, value in self.extra.items())
        return f"{self.model_type} {fields}".replace("_attention'", "'").strip()

    @property
    def auto(self) -> Any:
        return {"causal": AutoModelForCausalLM, "image": AutoModelForImageTextToText}[self.kind]

    def config(self) -> Any:
        """Return the config: six layers, small, every sliding window of few tokens."""
        built = BUILT.get(self.model_type, {})
        extra = {**built, **self.extra}
        for name, part in built.items():
            if isinstance(part, dict) and isinstance(extra[name], dict):
                extra[name] = {**part, **extra[name]}
        config = tiny_config(CONFIG_MAPPING[self.model_type], extra, LAYERS)
        for part in (config, config.get_text_config()):
            for name in _WINDOWS:
                if isinstance(getattr(part, name, None), int):
                    setattr(part, name, WINDOW)
        return config

    def model(self, seed: int = 0) -> Any:
        """Return a random model in evaluation mode, no bias, norm or stored buffer neutral.

        Raises:
            Exception: whatever its code raises where it cannot be built from its config alone.
        """
        torch.manual_seed(seed)
        model = self.auto.from_config(self.config()).float().eval()
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                tensor = parameters.get(name, tensor)
                if tensor.is_floating_point():
                    noise = torch.randn_like(tensor)
                    # A variance is none below zero.
                    tensor.add_(noise.abs() if name.endswith("_var") else noise, alpha=0.05)
        return model


def inputs(model: Any) -> dict[str, Any]:
    """Return a few tokens, and what else a model must be given to read them."""
    ids = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(1))
    given: dict[str, Any] = {"input_ids": ids}
    config = model.config
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    kind = getattr(config, "base_model_type", config.model_type)  # a slim model's says what it was
    if kind == "udop":
        given["bbox"] = torch.zeros(2, 10, 4)
    if kind == "idefics":
        size = config.vision_config.embed_dim
        noise = torch.Generator().manual_seed(2)
        given["image_encoder_embeddings"] = torch.randn(2, 1, 5, size, generator=noise)
        given["image_attention_mask"] = torch.ones(2, 10, 1)
    return given


def subjects(only: tuple[str, ...] = ()) -> list[Subject]:
    """Return every model to be tried, those of a mapping by name, then those with rules.

    Args:
        only: globs on the model type or on the whole name; all by default.
    """
    causal = sorted(AutoModelForCausalLM._model_mapping._model_mapping)
    images = sorted(AutoModelForImageTextToText._model_mapping._model_mapping)
    kinds = dict.fromkeys(causal, "causal")
    kinds |= {name: "image" for name in images if name not in causal or name in _BY_IMAGES}
    found = []
    for name, kind in kinds.items():
        found.append(Subject(name, kind))
        found += [Subject(name, kind, extra) for extra in RULES.get(name, [])]
    return [
        each
        for each in found
        if not only
        or any(fnmatchcase(n, glob) for glob in only for n in (each.model_type, each.name))
    ]
