"""GGUF files: tensors, names and keys against the model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from helpers_checkpoint import TEMPLATE, make_slim, same_bytes
from helpers_cli import ok
from helpers_gguf import (
    GEMMA,
    bpe_tokenizer,
    gemma,
    gguf,
    keys_of,
    kinds_of,
    long_phi3,
    narrowed,
    partial_phi3,
    tensors_of,
    with_rope,
    write,
)
from tiny import tiny_model

from llmslim import api
from llmslim.errors import CheckpointError
from llmslim.storage import load_model, open_source, write_checkpoint

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""What llama.cpp calls the parts of a Llama's layer."""
WIDTHS = [48, 72, 24, 96]


def in_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the rows that are rotated together next to each other.

    transformers rotates rows i and i + d/2 of a head of d rows; llama.cpp rows 2i and 2i + 1.
    """
    size = len(rows) // heads
    out = torch.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = rows[head * size + i]
            out[head * size + 2 * i + 1] = rows[head * size + i + size // 2]
    return out


def llama_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return what a file of a Llama holds, by its names."""
    state = model.state_dict()
    wanted = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for i in range(4):
        for name, here in LAYER.items():
            for leaf in ("weight", "bias"):
                if (tensor := state.get(f"model.layers.{i}.{here}.{leaf}")) is not None:
                    heads = {"attn_q": 4, "attn_k": 2}.get(name)
                    tensor = in_pairs(tensor, heads) if heads else tensor
                    wanted[f"blk.{i}.{name}.{leaf}"] = tensor
    return wanted


def test_a_llama_of_one_width(tmp_path: Path) -> None:
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    out = write(model, tmp_path / "m.gguf", bpe_tokenizer(), quantize="f32")
    found, wanted = tensors_of(out), llama_tensors(model)
    assert found.keys() == wanted.keys()
    assert len(found) == 3 + 4 * (9 + 7)
    assert all(same_bytes(found[name], wanted[name]) for name in wanted)
    config = model.config
    expected = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 0,
        "llama.block_count": 4,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": 48,
        "llama.feed_forward_length": 96,
        "llama.vocab_size": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 12,
        "llama.attention.value_length": 12,
        "llama.attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
        "llama.rope.dimension_count": 12,
        "llama.rope.freq_base": 10000.0,
    }
    assert expected.items() <= keys_of(out).items()


def test_layers_keep_their_widths(tmp_path: Path) -> None:
    model = narrowed("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out = write(model, tmp_path / "m.gguf", bpe_tokenizer(), quantize="f32")
    keys, found, wanted = keys_of(out), tensors_of(out), llama_tensors(model)
    assert keys["general.architecture"] == "deci"
    assert keys["deci.feed_forward_length"] == WIDTHS
    assert keys["deci.attention.head_count_kv"] == 2
    assert found.keys() == wanted.keys()
    assert all(same_bytes(found[name], wanted[name]) for name in wanted)
    assert all(same_bytes(before[name], tensor) for name, tensor in model.state_dict().items())


def test_fused_projections_are_split_where_layers_keep_their_widths(tmp_path: Path) -> None:
    model = narrowed("phi3")
    found = tensors_of(write(model, tmp_path / "m.gguf", quantize="f32"))
    layer = model.model.layers[0]
    q, k, v = layer.self_attn.qkv_proj.weight.data.split([48, 24, 24])
    gate, up = layer.mlp.gate_up_proj.weight.data.split(48)
    wanted = {"attn_q": in_pairs(q, 4), "attn_k": in_pairs(k, 2), "attn_v": v}
    for name, rows in {**wanted, "ffn_gate": gate, "ffn_up": up}.items():
        assert torch.equal(found[f"blk.0.{name}.weight"], rows)


def test_where_one_width_is_needed_it_is_the_widest(tmp_path: Path) -> None:
    model = narrowed("qwen3")
    out = write(model, tmp_path / "m.gguf", quantize="f32")
    keys, found = keys_of(out), tensors_of(out)
    assert keys["general.architecture"] == "qwen3"
    assert keys["qwen3.feed_forward_length"] == 96
    mlp = model.model.layers[0].mlp
    for part, there in {"gate": mlp.gate_proj, "up": mlp.up_proj}.items():
        rows = found[f"blk.0.ffn_{part}.weight"]
        assert torch.equal(rows[:48], there.weight)
        assert torch.equal(rows[48:], torch.zeros(48, 48))
    columns = found["blk.0.ffn_down.weight"]
    assert torch.equal(columns[:, :48], mlp.down_proj.weight)
    assert torch.equal(columns[:, 48:], torch.zeros(48, 48))


def test_a_rotation_that_deci_does_not_know_needs_one_width(tmp_path: Path) -> None:
    for model in (partial_phi3(), long_phi3()):
        out = write(model, tmp_path / "m.gguf", quantize="f32")
        keys, found = keys_of(out), tensors_of(out)
        assert keys["general.architecture"] == "phi3"
        assert keys["phi3.feed_forward_length"] == 96
        gate, up = found["blk.0.ffn_up.weight"].chunk(2)
        assert not gate[48:].any()
        assert not up[48:].any()
        assert torch.equal(up[:48], model.model.layers[0].mlp.gate_up_proj.weight[48:])


def test_a_quantised_file_is_within_a_step_of_the_weights(tmp_path: Path) -> None:
    model = narrowed("llama", hidden_size=64, head_dim=16, tie_word_embeddings=True)
    out = write(model, tmp_path / "m.gguf", quantize="q8_0")
    assert keys_of(out)["deci.feed_forward_length"] == [64, 96, 32, 96]
    kinds, found, wanted = kinds_of(out), tensors_of(out), llama_tensors(model)
    del wanted["output.weight"]  # tied
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        assert kinds[name] == ("F32" if exact.dim() == 1 else "Q8_0")
        # Neurons of zeros come last, and stay zero.
        padded = torch.zeros_like(found[name])
        padded[tuple(slice(size) for size in exact.shape)] = exact
        blocks = padded.reshape(-1, 32)
        step = blocks.abs().amax(dim=1, keepdim=True) / 127
        # Half a step for rounding, and 2^-11 of 127 steps for the scale's own in float16.
        error = (found[name].reshape(-1, 32) - blocks).abs()
        assert (error <= step * (0.5 + 127 * 2**-11) + 1e-7).all()
        assert exact.dim() == 1 or error.max() > 0


def test_what_a_type_cannot_hold_is_in_another(tmp_path: Path) -> None:
    model = tiny_model("llama")  # rows of 48: no whole number of scales
    kinds = kinds_of(write(model, tmp_path / "m.gguf", quantize="q4_0"))
    assert kinds["blk.0.ffn_gate.weight"] == kinds["token_embd.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "Q4_0"
    wide = write(tiny_model("llama", hidden_size=64), tmp_path / "w.gguf", quantize="q4_0")
    assert kinds_of(wide)["token_embd.weight"] == kinds_of(wide)["output.weight"] == "Q8_0"
    assert kinds_of(wide)["blk.0.ffn_gate.weight"] == "Q4_0"
    half = write(model, tmp_path / "h.gguf", quantize="f16")
    assert torch.equal(
        tensors_of(half)["blk.3.ffn_up.weight"], model.model.layers[3].mlp.up_proj.weight.half()
    )


def test_blocks_are_multiplied_out(tmp_path: Path) -> None:
    model = make_slim(
        tiny_model("llama"),
        {
            "mlp.up_proj": {"structure": "grouped_pointwise", "groups": 4},
            "self_attn.k_proj": {"structure": "low_rank", "rank": 5},
        },
    )
    found = tensors_of(write(model, tmp_path / "m.gguf", quantize="f32"))
    layer = model.model.layers[2]
    x = torch.eye(48)
    with torch.no_grad():
        up, k = layer.mlp.up_proj(x).t(), layer.self_attn.k_proj(x).t()
    torch.testing.assert_close(found["blk.2.ffn_up.weight"], up)
    torch.testing.assert_close(found["blk.2.attn_k.weight"], in_pairs(k, 2))


def test_what_gemma_has_besides(tmp_path: Path) -> None:
    for name in GEMMA:
        model = gemma(name)
        out = write(model, tmp_path / f"{name}.gguf", quantize="f32")
        keys, found = keys_of(out), tensors_of(out)
        assert keys["general.architecture"] == name
        assert keys[f"{name}.attention.sliding_window"] == 8
        assert "output.weight" not in found
        layer = model.model.layers[1]
        assert torch.equal(
            found["blk.1.post_ffw_norm.weight"], 1 + layer.post_feedforward_layernorm.weight
        )
        assert torch.equal(found["blk.1.attn_q.weight"], layer.self_attn.q_proj.weight)
        assert found["blk.0.ffn_up.weight"].shape == (96, 48)
        if name == "gemma2":
            assert keys["gemma2.attn_logit_softcapping"] == 3.0
            assert keys["gemma2.final_logit_softcapping"] == 2.0
        else:
            assert keys["gemma3.rope.freq_base"] == 1e6
            assert keys["gemma3.rope.freq_base_swa"] == 1e4
            assert torch.equal(
                found["blk.6.attn_k_norm.weight"], 1 + model.model.layers[6].self_attn.k_norm.weight
            )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3"])
def test_transformers_reads_the_same_weights_back(tmp_path: Path, architecture: str) -> None:
    # Their reader takes 128 for the size of Qwen3's heads, whatever the file says.
    model = tiny_model(architecture, **({"head_dim": 128} if architecture == "qwen3" else {}))
    out = write(model, tmp_path / "m.gguf", bpe_tokenizer(), quantize="f32")
    again = load_model(open_source(out)).state_dict()
    state = model.state_dict()
    assert again.keys() == state.keys()
    assert all(same_bytes(again[name], tensor) for name, tensor in state.items())


def test_a_file_of_several_widths_is_refused_by_name(tmp_path: Path) -> None:
    out = write(narrowed("llama"), tmp_path / "m.gguf", bpe_tokenizer())
    with pytest.raises(CheckpointError, match=r"m\.gguf: .*deci"):
        api.plan(out, "mlp-half")


def test_scaled_rotations(tmp_path: Path) -> None:
    model = with_rope("llama3")
    found = tensors_of(write(model, tmp_path / "3.gguf", quantize="f16"))["rope_freqs.weight"]
    plain = torch.tensor([10000.0 ** -(2 * i / 12) for i in range(6)])
    torch.testing.assert_close(plain / found, model.model.rotary_emb.inv_freq)
    assert found.max() == pytest.approx(8)
    keys = keys_of(write(with_rope("linear"), tmp_path / "l.gguf"))
    assert keys["llama.rope.scaling.type"] == "linear"
    assert keys["llama.rope.scaling.factor"] == 4.0


def test_a_window_that_llama_cpp_does_not_know_bounds_the_context(tmp_path: Path) -> None:
    keys = keys_of(write(tiny_model("mistral", sliding_window=8), tmp_path / "m.gguf"))
    assert keys["llama.context_length"] == 8
    free = write(tiny_model("mistral", sliding_window=None), tmp_path / "f.gguf")
    assert keys_of(free)["llama.context_length"] == 131072


def mixture() -> Any:
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, **heads))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (mixture, "MixtralForCausalLM: .*mixtral"),
        (lambda: tiny_model("gpt2"), "GPT2LMHeadModel: .*gpt2"),
        (lambda: tiny_model("llama", hidden_act="gelu"), "activation gelu"),
        (lambda: tiny_model("qwen3", attention_bias=True), r"q_proj\.bias"),
        (lambda: gemma("gemma2", query_pre_attn_scalar=256), "query_pre_attn_scalar 256"),
        (lambda: gemma("gemma3", final_logit_softcapping=5.0), "caps"),
        (lambda: gemma("gemma3", layer_types=["full_attention"] * 7), "layer_types"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise(tmp_path: Path, make: Any, names: str) -> None:
    with pytest.raises(CheckpointError, match=names):
        write(make(), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    model = tiny_model("llama")
    out = tmp_path / "m.gguf"
    out.write_bytes(b"before")
    model.model.layers[3].mlp.down_proj.weight.data[0, 0] = 1e5
    with pytest.raises(CheckpointError, match=r"blk\.3\.ffn_down\.weight: .*float16"):
        write(model, out, quantize="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert out.read_bytes() == b"before"
    write(model, out, quantize="f32")
    assert tensors_of(out)["blk.3.ffn_down.weight"][0, 0] == 1e5


def test_the_verb_and_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(narrowed("llama"), tmp_path / "slim", tokenizer=bpe_tokenizer())
    out = tmp_path / "new" / "m.gguf"
    assert api.export_gguf(folder, out) == out
    with pytest.raises(CheckpointError, match="exists already"):
        api.export_gguf(folder, out)
    with pytest.raises(CheckpointError, match="quantize: 'q2'"):
        api.export_gguf(folder, tmp_path / "x.gguf", quantize="q2")
    with pytest.raises(CheckpointError, match="a folder"):
        api.export_gguf(folder, tmp_path, overwrite=True)
    before = out.read_bytes()
    text = ok("export", folder, "--gguf", out, "--quantize", "q8_0", "--overwrite")
    assert text == f"wrote {out}\n"
    assert out.read_bytes() != before
    keys = keys_of(out)
    assert keys["general.name"] == "slim"
    assert keys["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert keys["tokenizer.chat_template"] == TEMPLATE
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"llmslim-toolkit\[gguf\]"):
        api.export_gguf(folder, out, overwrite=True)
