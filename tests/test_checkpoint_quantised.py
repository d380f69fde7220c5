"""Quantised weights: unpacked as the formats say, or refused with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers_checkpoint import edit_json, names, stored
from helpers_streaming import RECIPES, stored_model
from safetensors.torch import load_file, save_file

from llmslim import api
from llmslim.errors import CheckpointError

BLOCK = 8
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def fp8_model(folder: Path) -> dict[str, torch.Tensor]:
    """Write a model in fp8 with a scale for each block; return what its weights stand for."""
    stored_model(folder)
    packed, dense = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        packed[name] = dense[name] = weight.bfloat16()
        if name.endswith("_proj.weight"):
            rows, columns = weight.shape
            blocks = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448
            spread = scale[:, None, :, None]
            packed[name] = (blocks / spread).to(torch.float8_e4m3fn).reshape(rows, columns)
            packed[f"{name}_scale_inv"] = scale
            values = packed[name].float().reshape(blocks.shape) * spread
            dense[name] = values.reshape(rows, columns).bfloat16()
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    about = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    edit_json(folder / "config.json", quantization_config=about, dtype="bfloat16")
    return dense


def test_fp8_is_unpacked_and_written_plain(tmp_path: Path) -> None:
    dense = fp8_model(tmp_path / "m")
    made = api.convert(tmp_path / "m", RECIPES["depth"], tmp_path / "out")
    weights = stored(made.path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((made.path / "config.json").read_text())
    for name in ("mlp.up_proj.weight", "self_attn.k_proj.weight", "input_layernorm.weight"):
        here, there = weights[f"model.layers.1.{name}"], dense[f"model.layers.3.{name}"]
        torch.testing.assert_close(here, there, rtol=2**-7, atol=0)
    assert made.report.problems == ("Converted in memory, as a whole: its weights are quantised.",)


def test_fp8_takes_blocks(tmp_path: Path) -> None:
    fp8_model(tmp_path / "m")
    made = api.convert(tmp_path / "m", RECIPES["random"], tmp_path / "out", dtype="float32")
    assert api.verify(made.path).ok
    assert {tensor.dtype for tensor in stored(made.path).values()} == {torch.float32}


def test_mxfp4_experts_are_unpacked(tmp_path: Path) -> None:
    config = tf.GptOssConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_local_experts=2,
        num_experts_per_tok=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=96,
        layer_types=["full_attention", "full_attention"],
    )
    torch.manual_seed(0)
    tf.GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    dense = {}
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = weights.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 130, (experts, outputs, inputs // 32), dtype=torch.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        # Two values in a byte, the low half first; one power of two for 32 of them.
        pair = torch.stack((FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]), dim=-1)
        values = pair.flatten(-2) * torch.exp2(scales.float() - 127)[..., None]
        dense[name] = values.flatten(-2).transpose(1, 2)
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    edit_json(tmp_path / "m" / "config.json", quantization_config={"quant_method": "mxfp4"})
    recipe = {"name": "d", "depth": {"keep_layers": [1]}}
    made = stored(api.convert(tmp_path / "m", recipe, tmp_path / "out").path)
    for name in ("gate_up_proj", "down_proj"):
        here = made[f"model.layers.0.mlp.experts.{name}"]
        assert torch.equal(here.float(), dense[f"model.layers.1.mlp.experts.{name}"])


@pytest.mark.parametrize(
    "about",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors"},
        {"load_in_8bit": True},
        "int4",
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_other_formats_say_what_to_do(about: Any, inside: bool, tmp_path: Path) -> None:
    model = stored_model(tmp_path / "m")
    if inside:
        edit_json(model / "config.json", text_config={"quantization_config": about})
    else:
        edit_json(model / "config.json", quantization_config=about)
    method = about.get("quant_method", "None") if isinstance(about, dict) else about
    with pytest.raises(CheckpointError) as caught:
        api.convert(model, RECIPES["random"], tmp_path / "out")
    said = str(caught.value)
    assert f"its weights are quantised ({method})" in said
    assert "only plain weights, GGUF, fp8 and mxfp4 are read" in said
    assert "model.dequantize()" in said
    assert names(tmp_path) == ["m"]
