"""Exporting: an ordinary checkpoint of the base class with the slim model's function."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import make_slim, same_bytes, slim_llama, stored
from helpers_streaming import stored_model
from tiny import logits, tiny_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from llmslim import api
from llmslim.errors import CheckpointError
from llmslim.export import dense_copy
from llmslim.modeling.modeling_llmslim import become_slim, set_module
from llmslim.storage import load_model, open_source, quiet, write_checkpoint

GROUPED = {"structure": "grouped_pointwise", "groups": 4}
LOW_RANK = {"structure": "low_rank", "rank": 5}


@pytest.mark.parametrize(
    ("architecture", "blocks"),
    [
        ("llama", {"mlp.up_proj": GROUPED, "self_attn.o_proj": LOW_RANK}),
        ("phi3", {"gate_up_proj": GROUPED, "qkv_proj": LOW_RANK}),
        ("gpt2", {"mlp.c_fc": GROUPED, "mlp.c_proj": LOW_RANK, "attn.c_attn": LOW_RANK}),
        ("opt", {"fc1": GROUPED, "fc2": {**GROUPED, "variant": "residual"}}),
        ("gemma", {"mlp.down_proj": GROUPED}),
        ("qwen2", {"self_attn.q_proj": GROUPED}),
        ("bloom", {"dense_h_to_4h": GROUPED}),
    ],
)
def test_the_exported_folder_is_ordinary_and_computes_the_same(
    tmp_path: Path, architecture: str, blocks: dict[str, Any]
) -> None:
    slim = make_slim(tiny_model(architecture), blocks)
    slim.generation_config.max_new_tokens = 13
    before = {name: tensor.clone() for name, tensor in slim.state_dict().items()}
    out = write_checkpoint(dense_copy(slim), tmp_path / "dense")

    config = json.loads((out / "config.json").read_text())
    assert not {"llmslim", "auto_map", "base_model_type"} & config.keys()
    reference = tiny_model(architecture)
    assert config["model_type"] == reference.config.model_type
    assert config["architectures"] == [type(reference).__name__]
    assert not list(out.glob("*.py"))
    with quiet():
        dense: Any = AutoModelForCausalLM.from_pretrained(out)
    assert type(dense) is type(reference)
    assert dense.generation_config.max_new_tokens == 13
    assert {n: t.shape for n, t in dense.state_dict().items()} == {
        n: t.shape for n, t in reference.state_dict().items()
    }
    torch.testing.assert_close(
        logits(dense, tokens()), logits(slim, tokens()), atol=1e-4, rtol=1e-4
    )

    # What is no block goes over bit by bit, and the slim model is as it was.
    sites = tuple(f"{name}." for name in slim.config.llmslim["sites"])
    for name, tensor in before.items():
        assert same_bytes(slim.state_dict()[name], tensor)
        if not name.startswith(sites):
            assert same_bytes(dense.state_dict()[name], tensor)
    assert slim.config.model_type == "llmslim"


def test_the_copy_itself_is_a_whole_model(tmp_path: Path) -> None:
    slim = make_slim(tiny_model("gpt2"), {"mlp.c_fc": GROUPED})
    dense = dense_copy(slim)
    assert type(dense) is GPT2LMHeadModel
    assert isinstance(dense.transformer.h[0].mlp.c_fc, Conv1D)
    assert dense.lm_head.weight is dense.transformer.wte.weight
    assert not dense.training
    torch.testing.assert_close(
        logits(dense, tokens()), logits(slim, tokens()), atol=1e-4, rtol=1e-4
    )


def test_matrices_are_worked_out_in_float32_and_stored_in_the_models_type() -> None:
    slim = slim_llama(torch.bfloat16)
    block = slim.model.layers[2].self_attn.o_proj
    exact = block.up.weight.double() @ block.down.weight.double()
    dense = dense_copy(slim)
    weight = dense.model.layers[2].self_attn.o_proj.weight
    assert weight.dtype == torch.bfloat16
    # Rounded once; rounding the factors' product step by step in bfloat16 would be further off.
    torch.testing.assert_close(weight.double(), exact, rtol=2**-8, atol=1e-6)
    assert dense.config.dtype in (torch.bfloat16, "bfloat16")


def narrow(model: Any, widths: list[int]) -> Any:
    """Give each MLP a width of its own, as `linear` sites."""
    sites = {}
    for i, width in enumerate(widths):
        for name, shape in (("gate", (48, width)), ("up", (48, width)), ("down", (width, 48))):
            site = f"model.layers.{i}.mlp.{name}_proj"
            set_module(model, site, nn.Linear(*shape, bias=False))
            sites[site] = {
                "structure": "linear",
                "in_features": shape[0],
                "out_features": shape[1],
                "bias": False,
            }
    become_slim(model, sites)
    return model.eval()


def test_layers_of_one_other_width_export_through_the_config(tmp_path: Path) -> None:
    slim = narrow(tiny_model("llama"), [40] * 4)
    out = write_checkpoint(slim, tmp_path / "slim")
    dense = dense_copy(load_model(open_source(out)))
    assert type(dense) is LlamaForCausalLM
    assert dense.config.intermediate_size == 40
    write_checkpoint(dense, tmp_path / "dense")
    assert torch.equal(logits(dense, tokens()), logits(slim, tokens()))


WIDTHS = {"structure": "width", "keep_ratio": 0.5}, {"structure": "width", "keep_ratio": 0.75}


@pytest.mark.parametrize(
    ("architecture", "changes", "layers", "rows", "columns"),
    [
        ("llama", {"mlp_bias": True}, "model.layers", ("gate_proj", "up_proj"), "down_proj"),
        ("qwen2", {}, "model.layers", ("gate_proj", "up_proj"), "down_proj"),
        ("gemma", {}, "model.layers", ("gate_proj", "up_proj"), "down_proj"),
        ("phi3", {}, "model.layers", ("gate_up_proj",), "down_proj"),
        ("gpt2", {}, "transformer.h", ("c_fc",), "c_proj"),
        ("bloom", {}, "transformer.h", ("dense_h_to_4h",), "dense_4h_to_h"),
    ],
)
def test_narrow_mlps_are_filled_up_with_zeros_to_the_widest(
    architecture: str, changes: Any, layers: str, rows: tuple[str, ...], columns: str
) -> None:
    slim = tiny_model(architecture, **changes)
    full = slim.get_submodule(f"{layers}.0.mlp.{columns}").weight.shape
    neurons = max(full)
    rules = [
        {"match": f"{layers}.0.mlp.*", **WIDTHS[0]},
        {"match": f"{layers}.[123].mlp.*", **WIDTHS[1]},
    ]
    api.slim(slim, {"name": "narrow", "init": "project", "replace": rules})
    dense = dense_copy(slim)
    assert type(dense) is type(tiny_model(architecture))
    # Sums of more terms, all of them zeros, may be added up in another order.
    torch.testing.assert_close(logits(dense, tokens()), logits(slim, tokens()), rtol=0, atol=1e-6)

    widest = neurons * 3 // 4
    # Nothing in BLOOM's config sizes its MLPs: they get back all of their neurons.
    wanted = neurons if architecture == "bloom" else widest
    for i, kept in enumerate([neurons // 2, widest, widest, widest]):
        mlp, was = (each.get_submodule(f"{layers}.{i}.mlp") for each in (dense, slim))
        weight, old = mlp.get_submodule(columns).weight, was.get_submodule(columns).weight
        if architecture == "gpt2":
            weight, old = weight.t(), old.t()
        assert weight.shape == (48, wanted)
        assert torch.equal(weight[:, :kept], old)
        assert not weight[:, kept:].any()
        for name in rows:
            new, old = mlp.get_submodule(name), was.get_submodule(name)
            parts = 2 if name == "gate_up_proj" else 1
            for key, tensor in old.state_dict().items():
                transposed = architecture == "gpt2" and key == "weight"
                now, before = new.state_dict()[key], tensor
                now, before = (now.t(), before.t()) if transposed else (now, before)
                for part, half in zip(now.chunk(parts), before.chunk(parts), strict=True):
                    assert len(part) == wanted
                    assert torch.equal(part[:kept], half)
                    assert not part[kept:].any()


def test_a_narrow_mlp_with_blocks_is_multiplied_out_and_filled_up(tmp_path: Path) -> None:
    slim = tiny_model("llama")
    block = {"structure": "low_rank", "rank": 6, "neurons": 0.75}
    rules = [
        {"match": "model.layers.0.mlp.*", **block},
        {"match": "model.layers.[12].mlp.*", **WIDTHS[0]},
        {"match": "model.layers.3.mlp.*", "structure": "width", "keep_ratio": 0.25},
    ]
    api.slim(slim, {"name": "both", "init": "project", "replace": rules})
    out = write_checkpoint(dense_copy(slim), tmp_path / "dense")
    with quiet():
        dense = AutoModelForCausalLM.from_pretrained(out)
    assert type(dense) is LlamaForCausalLM
    assert dense.config.intermediate_size == 72
    torch.testing.assert_close(
        logits(dense, tokens()), logits(slim, tokens()), atol=1e-4, rtol=1e-4
    )


def test_what_has_no_ordinary_form() -> None:
    with pytest.raises(CheckpointError, match=r"^LlamaForCausalLM: "):
        dense_copy(tiny_model("llama"))
    slim = narrow(tiny_model("llama"), [])
    site = "model.layers.0.self_attn.v_proj"  # a size that no field and no zeros make up for
    set_module(slim, site, nn.Linear(48, 20, bias=False))
    with pytest.raises(CheckpointError, match=rf"{site}\.weight: \[20, 48\], and 0 "):
        dense_copy(slim)
    active = {**GROUPED, "variant": "residual", "activation": "relu"}
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj: .*'relu'"):
        dense_copy(make_slim(tiny_model("llama"), {"up_proj": active}))


@pytest.mark.parametrize("tied", [False, True])
def test_a_factored_embedding_and_head_export_as_whole_tables(tmp_path: Path, tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    wide = {"structure": "grouped_pointwise", "in_features": 16, "out_features": 48, "groups": 4}
    slim = narrow(model, [])
    sites = {
        "model.embed_tokens": {
            "structure": "factored_embedding",
            "num_embeddings": 96,
            "embedding_dim": 16,
            "projection": wide,
        },
        "lm_head": {
            "structure": "factored_head",
            "out_features": 96,
            "projection": {**wide, "in_features": 48, "out_features": 16},
        },
    }
    from llmslim.modeling.modeling_llmslim import replace_sites

    torch.manual_seed(3)
    replace_sites(slim, sites)
    become_slim(slim, sites)
    slim.tie_weights()
    dense = dense_copy(slim)
    assert not dense.config.tie_word_embeddings
    torch.testing.assert_close(
        logits(dense, tokens()), logits(slim, tokens()), atol=1e-4, rtol=1e-4
    )
    out = write_checkpoint(dense, tmp_path / "dense")
    assert stored(out)["lm_head.weight"].shape == (96, 48)


def test_an_exported_mixture_has_the_names_of_the_models_own_files(tmp_path: Path) -> None:
    model = stored_model(tmp_path / "m", "mixtral")
    rule = {"match": "*.experts.*", "structure": "low_rank", "keep_ratio": 0.5}
    recipe = {"name": "r", "init": "project", "replace": [rule]}
    slim = api.convert(model, recipe, tmp_path / "slim").path
    dense = api.export_dense(slim, tmp_path / "dense")
    here, there = stored(dense), stored(model)
    assert {name: tensor.shape for name, tensor in here.items()} == {
        name: tensor.shape for name, tensor in there.items()
    }
    assert any(name.endswith("experts.3.w3.weight") for name in here)
    loaded = AutoModelForCausalLM.from_pretrained(dense)
    assert type(loaded).__name__ == "MixtralForCausalLM"
    torch.testing.assert_close(logits(loaded, tokens()), logits(api.load(slim), tokens()))


def test_sums_of_two_products_are_rounded_once() -> None:
    model = tiny_model("llama", num_hidden_layers=1).bfloat16()
    rule = {"match": "*.o_proj", "structure": "grouped_low_rank", "groups": 4, "rank": 4}
    api.slim(model, {"init": "random", "replace": [rule]})
    block = model.model.layers[0].self_attn.o_proj
    exact = copy.deepcopy(block).double().to_dense()
    weight = dense_copy(model).model.layers[0].self_attn.o_proj.weight
    assert torch.equal(weight, exact.bfloat16())
