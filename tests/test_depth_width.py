"""Fewer layers, wider and narrower MLPs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, few, logits, tiny_model, tokens

import llmslim
from llmslim import RecipeError, SizeError, TargetError
from llmslim.planning.depth import kept_layers
from llmslim.recipe import Recipe


@pytest.mark.parametrize("architecture", few(ARCHITECTURES))
def test_dropping_layers_equals_skipping_them(architecture: str) -> None:
    """Truth: the dense model with the dropped layers turned into identities."""
    model, dense = tiny_model(architecture), tiny_model(architecture)
    llmslim.slim(model, {"depth": {"keep_layers": [0, 2]}})
    assert type(model) is type(dense)
    assert model.config.num_hidden_layers == 2

    stack = next(m for m in dense.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    for index in (1, 3):
        stack[index].register_forward_hook(_identity, with_kwargs=True)
    ids = tokens()
    assert torch.allclose(logits(model, ids), logits(dense, ids), atol=1e-5)


def _identity(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def test_a_count_spreads_from_first_to_last() -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    llmslim.slim(model, {"depth": {"keep_layers": 2}})
    for new, old in ((0, 0), (1, 3)):
        pairs = zip(
            model.model.layers[new].parameters(), dense.model.layers[old].parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]


def test_per_layer_lists_follow() -> None:
    model = tiny_model("qwen3")
    model.config.layer_types = ["full_attention", "sliding_attention"] * 2
    llmslim.slim(model, {"depth": {"keep_layers": [1, 2]}})
    assert model.config.layer_types == ["sliding_attention", "full_attention"]


def test_lists_of_token_ids_are_not_per_layer() -> None:
    model = tiny_model("llama")
    model.config.eos_token_id = [1, 2, 3, 4]
    llmslim.slim(model, {"depth": {"keep_layers": [1, 2]}})
    assert model.config.eos_token_id == [1, 2, 3, 4]


@pytest.mark.parametrize("keep", [5, [0, 4], [1, 1]])
def test_layers_that_are_not_there(keep: Any) -> None:
    model = tiny_model("llama")
    with pytest.raises(RecipeError, match=r"depth\.keep_layers"):
        llmslim.slim(model, {"depth": {"keep_layers": keep}})
    assert len(model.model.layers) == 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("factor", [1.25, 3])
def test_wider_is_the_same_function(architecture: str, factor: float) -> None:
    model, dense = tiny_model(architecture).double(), tiny_model(architecture).double()
    width = math.ceil(factor * (192 if architecture in ("gpt2", "bloom") else 96))
    report = llmslim.slim(model, {"width": {"intermediate_size": width}})
    assert report.totals.params_after == sum(p.numel() for p in model.parameters())
    assert report.totals.params_after > report.totals.params_before
    ids = tokens()
    assert torch.allclose(logits(model, ids), logits(dense, ids), atol=1e-10)


@pytest.mark.parametrize("architecture", few(ARCHITECTURES))
def test_narrower_drops_neurons_that_do_nothing_first(architecture: str) -> None:
    """Neurons whose outgoing weights are zero must go, and with them nothing of the function."""
    model = tiny_model(architecture).double()
    recipe = {"width": {"intermediate_size": 60}}
    mlps = [plan.mlp for plan in llmslim.plan(model, recipe).mlps]
    generator = torch.Generator().manual_seed(3)
    for mlp in mlps:
        down = model.get_submodule(mlp.down)
        dead = torch.randperm(mlp.width, generator=generator)[: mlp.width - 60]
        axis = 0 if down.weight.shape[0] == mlp.width and architecture == "gpt2" else 1
        with torch.no_grad():
            down.weight.index_fill_(axis, dead, 0.0)
    ids = tokens()
    expected = logits(model, ids)
    llmslim.slim(model, recipe)
    assert torch.allclose(logits(model, ids), expected, atol=1e-10)


def test_width_without_a_config_field_becomes_sites(tmp_path: Any) -> None:
    """BLOOM's MLP is four times its hidden size by definition: the checkpoint says otherwise."""
    model = tiny_model("bloom")
    llmslim.slim(model, {"width": {"intermediate_size": 100}})
    ids = tokens()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = llmslim.load(tmp_path)
    assert torch.equal(logits(loaded, ids), expected)
    assert loaded.transformer.h[0].mlp.dense_h_to_4h.out_features == 100


def test_no_mlp_to_resize() -> None:
    model = tiny_model("llama")
    llmslim.slim(model, {"replace": [{"match": "*.mlp.*", "structure": "low_rank", "rank": 2}]})
    with pytest.raises(TargetError, match="LlamaForCausalLM"):
        llmslim.slim(model, {"width": {"intermediate_size": 64}})


def test_slimming_twice_with_fewer_layers(tmp_path: Any) -> None:
    model = tiny_model("llama")
    llmslim.slim(model, {"replace": [{"match": "*.up_proj", "structure": "low_rank", "rank": 2}]})
    recipe = {
        "depth": {"keep_layers": [1, 3]},
        "replace": [{"match": "*.down_proj", "structure": "grouped_pointwise", "groups": 4}],
    }
    report = llmslim.slim(model, recipe)
    assert {row.reason for row in report.rows if row.name.endswith("layers.1.mlp.up_proj")} == {
        "a block already"
    }
    ids = tokens()
    model.save_pretrained(tmp_path)
    loaded = llmslim.load(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert set(loaded.config.llmslim["sites"]) == {
        f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("up", "down")
    }


def test_groups_are_checked_against_the_new_width() -> None:
    recipe = {
        "width": {"intermediate_size": 100},
        "replace": [{"match": "*.down_proj", "structure": "grouped_pointwise", "groups": 8}],
    }
    with pytest.raises(SizeError, match="100"):
        llmslim.slim(tiny_model("llama"), recipe)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_neurons_behind_a_closed_gate_go_first(architecture: str) -> None:
    """A neuron that its gate never lets through does nothing, however large its other weights."""
    model, dense = tiny_model(architecture).double(), tiny_model(architecture).double()
    for each in (model, dense):
        with torch.no_grad():
            for layer in each.model.layers:
                mlp = layer.mlp
                if architecture == "phi3":
                    gate, up = mlp.gate_up_proj.weight.chunk(2)
                else:
                    gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
                gate[::2] = 0
                up[::2] *= 100
    llmslim.slim(model, {"width": {"intermediate_size": 48}})
    assert torch.allclose(logits(model, tokens()), logits(dense, tokens()), atol=1e-10)


def test_a_share_of_neurons_means_the_fraction_it_is_written_for() -> None:
    rule = {"match": "*.mlp.*", "structure": "width", "keep_ratio": 0.333}
    made = llmslim.plan(tiny_model("llama"), {"init": "least_squares", "replace": [rule]})
    assert {each.width for each in made.mlps} == {31}
    rule["keep_ratio"] = 0.3333
    made = llmslim.plan(tiny_model("llama"), {"init": "least_squares", "replace": [rule]})
    assert {each.width for each in made.mlps} == {96 // 3}


@pytest.mark.parametrize(("keep", "count"), [(1, 5), (2, 5), (3, 4), (3, 32), (7, 30), (5, 5)])
def test_a_count_keeps_the_layers_nearest_to_even_steps(keep: int, count: int) -> None:
    kept = kept_layers(Recipe.of({"depth": {"keep_layers": keep}}), count)
    assert len(set(kept)) == keep
    if keep > 1:
        assert (kept[0], kept[-1]) == (0, count - 1)
    for place, layer in enumerate(kept):
        assert abs(layer - place * (count - 1) / max(1, keep - 1)) <= 0.5
