"""Experts, and other sites that are no nn.Linear: what a plan makes of them, and fits to text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_architecture import logits, tiny_model
from test_experts import CLASSES, recipe

from llmslim import fitting, planning
from llmslim.anatomy import sites
from llmslim.anatomy.sites import find_experts, find_sites
from llmslim.errors import SizeError, TargetError
from llmslim.fitting.calibration import TokenWindows
from llmslim.planning.planner import model_on_meta
from llmslim.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# ----------------------------------------------------------------------------- plans


def test_orientation_follows_the_model() -> None:
    sizes = {}
    for name in ("gpt_oss", "llama4_text", "mixtral", "inkling_text"):
        for site in find_experts(model_on_meta(CLASSES[name]())).values():
            sizes[name, site.name.rpartition(".")[2]] = (site.in_features, site.out_features)
    assert sizes["gpt_oss", "gate_up_proj"] == (2880, 5760)
    assert sizes["llama4_text", "gate_up_proj"] == (5120, 16384)
    assert sizes["llama4_text", "down_proj"] == (8192, 5120)
    assert sizes["mixtral", "gate_up_proj"] == (4096, 28672)
    assert sizes["mixtral", "down_proj"] == (14336, 4096)
    assert sizes["inkling_text", "gate_proj"] == (6144, 3072)


def test_operations_are_those_of_the_experts_a_token_meets() -> None:
    config = CLASSES["mixtral"]()
    rows = {
        row.name: row for row in planning.plan(config, recipe(structure="low_rank", rank=8)).rows
    }
    row = rows["model.layers.0.mlp.experts.down_proj"]
    assert row.params_before == 8 * 14336 * 4096
    assert row.flops_per_token_before == 2 * 2 * 14336 * 4096  # two of eight
    assert row.params_after == 8 * 8 * (14336 + 4096)
    assert row.flops_per_token_after == 2 * 2 * 8 * (14336 + 4096)
    assert row.options == {"experts": 8, "rank": 8}


def test_routing_is_no_site_and_biases_stay() -> None:
    everything = Recipe.of({"replace": [{"match": "*", "structure": "low_rank", "rank": 1}]})
    rows = {r.name: r for r in planning.plan(tiny_model(CLASSES["jetmoe"]), everything).rows}
    router = rows["model.layers.0.mlp.router.layer"]  # an nn.Linear
    assert (router.action, router.reason) == ("kept", "a router: it chooses the experts")
    rows = {r.name: r for r in planning.plan(tiny_model(CLASSES["gpt_oss"]), everything).rows}
    assert rows["model.layers.0.mlp.experts"].reason == "biases of the experts"
    assert rows["model.layers.0.mlp.router"].reason == "a router: it chooses the experts"


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("structure", {"structure": "width", "keep_ratio": 0.5}),
        ("neurons", {"structure": "low_rank", "neurons": 0.5, "rank": 2}),
    ],
)
def test_fewer_neurons_are_not_for_experts(key: str, rule: dict[str, Any]) -> None:
    with pytest.raises(SizeError, match=rf"replace\[0\]\.{key}: model\.layers\.0"):
        planning.plan(CLASSES["mixtral"](), recipe(**rule))


@pytest.mark.parametrize("structure", ["low_rank", "auto"])
def test_calibration_fits_experts_too(structure: str) -> None:
    model = tiny_model(CLASSES["mixtral"])
    sites = find_experts(model)
    rule: dict[str, Any] = {"match": ["*mlp.*", "*attn*"], "structure": structure}
    data = {"replace": [rule], "init": "least_squares"}
    data |= {"budget": 0.5} if structure == "auto" else {}
    if structure == "low_rank":
        rule["keep_ratio"] = 0.5
    plan = planning.plan(model, Recipe.of(data))
    assert {site.init for site in plan.sites if site.is_experts} == {"least_squares"}
    windows = torch.randint(3, 90, (5, 16), generator=torch.Generator().manual_seed(0))
    calibration = TokenWindows(windows[:4], windows[4:])
    chosen = Recipe.of(data)
    if chosen.has_auto:
        chosen = fitting.allocate(model, chosen, calibration)
    report = fitting.rewrite(model, planning.plan(model, chosen), calibration=calibration)
    rows = {row.name: row for row in report.rows}
    assert all(rows[name].action == "replaced" for name in sites)
    assert all(rows[name].params_after <= rows[name].params_before / 2 for name in sites)
    assert all(rows[name].init_error is not None for name in sites)
    assert rows["model.layers.0.self_attn.q_proj"].action in ("replaced", "kept")
    assert logits(model).isfinite().all()


# ----------------------------------------------------------------------------- other sites


def test_what_layers_share_is_replaced_once_and_seen_by_all() -> None:
    model = tiny_model(CLASSES["zamba"])
    first, second = (model.model.layers[n].shared_transf.self_attn for n in (1, 3))
    assert first.q_proj.weight is second.q_proj.weight
    count = sum(p.numel() for p in model.parameters())
    rule = {"match": "*.self_attn.*", "structure": "low_rank", "keep_ratio": 0.5}
    report = fitting.rewrite(
        model, planning.plan(model, Recipe.of({"init": "random", "replace": [rule]}))
    )
    assert first.q_proj is second.q_proj
    rows = {row.name: row for row in report.rows}
    assert rows["model.layers.1.shared_transf.self_attn.q_proj"].action == "replaced"
    tied = rows["model.layers.3.shared_transf.self_attn.q_proj"]
    assert (tied.action, tied.params_before, tied.params_after) == ("tied", 0, 0)
    assert 0 < tied.flops_per_token_after < tied.flops_per_token_before
    assert report.totals.params_before == count
    assert report.totals.params_after == sum(p.numel() for p in model.parameters())


def test_layers_that_share_are_dropped_together_only() -> None:
    data = {"depth": {"keep_layers": [0, 2, 3]}, "replace": []}
    with pytest.raises(TargetError, match=r"^model\.layers: .* 1 and 3 .*depth\.keep_layers"):
        planning.plan(tiny_model(CLASSES["zamba"]), Recipe.of(data))


def test_decoder_layers_are_those_of_the_text_part() -> None:
    config = CLASSES["gemma3"]()
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers
    model = model_on_meta(config)
    assert sites.find_layers(model).path == "model.language_model.layers"


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("mamba", "backbone.layers.0.mixer.out_proj", "MambaMixer reads its weight"),
        ("deepseek_v4", "model.layers.0.self_attn.o_a_proj", "computes more than a dense map"),
        ("gemma3", "model.vision_tower.head.attention.out_proj", "MultiheadAttention reads its"),
        ("rwkv", "rwkv.blocks.0.attention.output", "RwkvModel reads its weight"),
        ("jamba", "model.layers.0.mamba", "parameters of a recurrence"),
        ("mamba", "backbone.layers.0.mixer.conv1d", "a convolution"),
        ("got_ocr2", "model.vision_tower", "a position table"),
        ("xlnet", "transformer.layer.0.rel_attn", "multiplies with it in its own way"),
    ],
)
def test_what_cannot_be_exchanged_says_why(name: str, path: str, reason: str) -> None:
    everything = Recipe.of({"replace": [{"match": "*", "structure": "low_rank", "rank": 1}]})
    rows = {row.name: row for row in planning.plan(CLASSES[name](), everything).rows}
    assert rows[path].action == "kept"
    assert reason in rows[path].reason


def test_a_subclass_that_multiplies_as_linear_does_is_a_site() -> None:
    model = model_on_meta(CLASSES["falcon"]())
    assert type(model.transformer.h[0].mlp.dense_h_to_4h) is not torch.nn.Linear
    assert "transformer.h.0.mlp.dense_h_to_4h" in find_sites(model)
