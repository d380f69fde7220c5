"""Tiny random models of every architecture the tests try; built from configs, never downloaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
import torch
import transformers as tf

_HEADS = {"num_attention_heads": 4}
_SIZES = {"hidden_size": 48, "num_hidden_layers": 4, "vocab_size": 96, **_HEADS}
_GATED = {**_SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "pad_token_id": 0}


_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**_GATED),
    "qwen2": lambda: tf.Qwen2Config(**_GATED),
    "qwen3": lambda: tf.Qwen3Config(**_GATED, head_dim=12),
    "gemma": lambda: tf.GemmaConfig(**_GATED, head_dim=12),
    "phi3": lambda: tf.Phi3Config(**_GATED),
    "mistral": lambda: tf.MistralConfig(**_GATED, sliding_window=8),
    "gpt2": lambda: tf.GPT2Config(n_embd=48, n_layer=4, n_head=4, vocab_size=96, n_positions=64),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_SIZES, intermediate_size=96),
    "opt": lambda: tf.OPTConfig(
        **_SIZES, ffn_dim=96, word_embed_proj_dim=48, max_position_embeddings=64
    ),
    "bloom": lambda: tf.BloomConfig(hidden_size=48, n_layer=4, n_head=4, vocab_size=96),
    "falcon": lambda: tf.FalconConfig(**_SIZES, ffn_hidden_size=96, new_decoder_architecture=False),
}


ARCHITECTURES = tuple(_CONFIGS)
_CONFIGS |= {  # their code changes what the head gives
    "gemma2": lambda: tf.Gemma2Config(**_GATED, head_dim=12, final_logit_softcapping=2.0),
    "cohere": lambda: tf.CohereConfig(**_GATED, logit_scale=0.25),
}

MIXTRAL = dict.fromkeys(("hidden_size", "intermediate_size"), 16) | {"num_hidden_layers": 1}
MIXTRAL |= {"vocab_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
"""Sizes of a tiny Mixtral."""


def few(names: Iterable[str], usual: Collection[str] = ("llama", "phi3", "gpt2")) -> list[Any]:
    """Return names as parameters of a test, all but the usual ones marked slow.

    Llama's projections stand alone, Phi-3's are fused, GPT-2's are transposed.
    """
    return [pytest.param(name, marks=() if name in usual else pytest.mark.slow) for name in names]


def tiny_config(architecture: str) -> Any:
    """Return a fresh config of a 4-layer model of that architecture."""
    return _CONFIGS[architecture]()


def tiny_model(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """Return a random 4-layer model in evaluation mode.

    Weights are larger than a training start's, biases and norms not at their neutral values, so
    that an exchanged channel, a lost bias or a missing norm moves the logits.
    """
    config = tiny_config(architecture)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def tokens(rows: int = 2, length: int = 10, *, vocab: int = 96, seed: int = 1) -> torch.Tensor:
    """Return random token ids, (rows, length), none of them the padding token 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab, (rows, length), generator=generator)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return a model's logits without a cache."""
    return model(ids, use_cache=False).logits
