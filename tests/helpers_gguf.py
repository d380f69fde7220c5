"""Tiny models written as GGUF files, and what such a file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers_checkpoint import TEMPLATE
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmslim import api
from llmslim.export import write_gguf

gguf = pytest.importorskip("gguf")


def narrowed(
    architecture: str, shares: tuple[float, ...] = (0.5, 0.75, 0.25), **changes: Any
) -> Any:
    """Return a tiny model with fewer neurons in its first layers."""
    model = tiny_model(architecture, **changes)
    rules = [
        {"match": f"*.layers.{i}.mlp.*", "structure": "width", "keep_ratio": share}
        for i, share in enumerate(shares)
    ]
    api.slim(model, {"name": "narrow", "init": "project", "replace": rules})
    return model


def bpe_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 96 tokens, all of them ASCII, with one merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:93]
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", *alphabet, "!!"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("!", "!")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", **special
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(model: Any, out: Path, tokenizer: Any = None, **options: Any) -> Path:
    return write_gguf(model, out, name="tiny", tokenizer=tokenizer, **options)


def keys_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Return what is stored, as float32."""
    return {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(path).tensors
    }


def kinds_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


GEMMA = {
    "gemma2": {"query_pre_attn_scalar": 12, "attn_logit_softcapping": 3.0, "sliding_window": 8},
    "gemma3": {"query_pre_attn_scalar": 12, "sliding_window": 8},
}


def gemma(name: str, **changes: Any) -> Any:
    settings = {**GEMMA[name], **changes}
    if name == "gemma2":
        return narrowed("gemma2", **settings)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "vocab_size": 96, "head_dim": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 7}
    config = tf.Gemma3TextConfig(**sizes, **heads, pad_token_id=0, **settings)
    torch.manual_seed(0)
    model = tf.Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    rule = {"match": "*.layers.[02].mlp.*", "structure": "width", "keep_ratio": 0.5}
    api.slim(model, {"name": "narrow", "init": "project", "replace": [rule]})
    return model


ROPE = {
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "linear": {"factor": 4.0},
}


def with_rope(kind: str, *, narrow: bool = False) -> Any:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **ROPE[kind]}
    changes = {"rope_parameters": parameters, "max_position_embeddings": 256}
    return narrowed("llama", **changes) if narrow else tiny_model("llama", **changes)


def partial_phi3() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return narrowed("phi3", rope_parameters=rope)


def long_phi3() -> Any:
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.5, 1.9, 2.1], "long_factor": [2.0] * 6}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    lengths = {"original_max_position_embeddings": 256, "max_position_embeddings": 512}
    return narrowed("phi3", rope_parameters=rope, **lengths)
