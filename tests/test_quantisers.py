"""What quantisers of linear layers reach in a slim model, and what the report says they do not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn

import llmslim
from llmslim.modeling.structured import build

HIDDEN, WIDTH = 48, 96
"""Of the tiny Llama; an MLP has three projections of these sizes, in four layers."""


def weights_passed_by(rule: dict[str, Any]) -> int:
    """The number in the report's sentence; 0 where there is none."""
    recipe = {"name": "r", "init": "project", "replace": [{"match": "*.mlp.*", **rule}]}
    report = llmslim.plan(tiny_model("llama"), recipe).report()
    way = r"([\d,]+) weights in (\d+) blocks .* llmslim\.quantize_blocks\(model, bits=4\)"
    found = [re.search(way, each) for each in report.problems]
    sentences = [each for each in found if each]
    assert len(sentences) <= 1
    assert all(each[2] == "12" for each in sentences)
    return sum(int(each[1].replace(",", "")) for each in sentences)


@pytest.mark.parametrize(
    ("rule", "passed_by"),
    [
        ({"structure": "low_rank", "rank": 4}, 0),
        ({"structure": "pivoted_low_rank", "rank": 4}, 0),
        ({"structure": "width", "keep_ratio": 0.5}, 0),
        ({"structure": "grouped_pointwise", "groups": 4}, 12 * 2 * HIDDEN * WIDTH // 4),
        ({"structure": "grouped_low_rank", "groups": 8, "rank": 2}, 12 * 2 * HIDDEN * WIDTH // 8),
    ],
)
def test_the_report_counts_what_is_in_no_linear_layer(rule: Any, passed_by: int) -> None:
    assert weights_passed_by(rule) == passed_by


@pytest.mark.parametrize("structure", ["low_rank", "pivoted_low_rank"])
def test_thin_products_are_linear_layers_of_torchs_own_class(structure: str) -> None:
    sizes = {"in_features": 12, "out_features": 8, "bias": True, "rank": 3}
    block = build({"structure": structure, **sizes})
    linears = [module for module in block.modules() if type(module) is nn.Linear]
    assert len(linears) == 2
    inside = {id(parameter) for module in linears for parameter in module.parameters()}
    others = [name for name, p in block.named_parameters() if id(p) not in inside]
    assert others == ["bias"]


def test_narrowed_projections_are_too(tmp_path: Any) -> None:
    model = tiny_model("llama")
    rule = {"match": "*.1.mlp.*", "structure": "width", "keep_ratio": 0.5}
    llmslim.slim(model, {"name": "narrow", "init": "project", "replace": [rule]})
    llmslim.save(model, tmp_path / "slim")
    loaded: Any = llmslim.load(tmp_path / "slim")
    for each in (model, loaded):
        up, down = each.model.layers[1].mlp.up_proj, each.model.layers[1].mlp.down_proj
        assert type(up) is type(down) is nn.Linear
        assert (up.out_features, down.in_features) == (WIDTH // 2, WIDTH // 2)
    assert torch.equal(
        loaded.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight
    )
