"""Fewer neurons, fitted to calibration tokens: against regressions and the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_fitting import WINDOWS, distance, rows_of
from helpers_fitting import in_full_precision as in_full_precision
from tiny import logits, tiny_model, tokens

import llmslim
from llmslim.anatomy.sites import dense_weight, find_layers, find_mlps
from llmslim.editing.resize import keep_neurons
from llmslim.fitting.neurons import eliminate
from llmslim.init import damping


def test_width_by_ratio_is_a_plain_model() -> None:
    model = tiny_model("llama")
    recipe = {
        "init": "least_squares",
        "replace": [{"match": "*.mlp.*", "structure": "width", "keep_ratio": "2/3"}],
    }
    report = llmslim.slim(model, recipe, calibration=WINDOWS)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.intermediate_size == 64
    assert report.totals.params_after == sum(p.numel() for p in model.parameters())
    (row,) = rows_of(report, "layers.2.mlp.down_proj")
    assert (row.action, row.structure, row.options) == ("replaced", "width", {"neurons": 64})
    assert 0 < row.init_error < 1


def test_widths_that_differ_travel_in_the_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("phi3")
    recipe = {
        "init": "least_squares",
        "replace": [
            {"match": "*.0.mlp.*", "structure": "width", "keep_ratio": 0.75},
            {"match": "*.mlp.*", "structure": "width", "keep_ratio": 0.5},
        ],
    }
    llmslim.slim(model, recipe, calibration=WINDOWS)
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path)
    loaded: Any = llmslim.load(tmp_path)
    assert torch.equal(logits(loaded, tokens()), expected)
    widths = [layer.mlp.down_proj.in_features for layer in loaded.model.layers]
    assert widths == [72, 48, 48, 48]


def test_neurons_that_do_nothing_go_first_and_nothing_is_lost() -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    for either in (model, dense):
        for layer in either.model.layers:
            with torch.no_grad():
                layer.mlp.down_proj.weight[:, 10:58] = 0
    recipe = {
        "init": "least_squares",
        "replace": [{"match": "*.mlp.*", "structure": "width", "keep_ratio": 0.5}],
    }
    llmslim.slim(model, recipe, calibration=WINDOWS)
    assert distance(model, dense) < 1e-3


def activations(rows: int, neurons: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(rows, neurons, generator=generator, dtype=torch.float64)
    return mixed @ torch.randn(neurons, neurons, generator=generator, dtype=torch.float64)


def test_what_is_left_is_refitted_by_damped_least_squares() -> None:
    x_TM, w_OM = activations(200, 60), torch.randn(5, 60, dtype=torch.float64)
    gram = x_TM.t() @ x_TM / 200
    found = eliminate(w_OM, gram, [50, 24, 60])
    # The same as a regression with one more row for each weight, which pulls it towards the old.
    pull_MM = (damping(gram) * 200).sqrt().diag()
    for width, (kept, weight_OK) in found.items():
        rows = torch.cat((x_TM[:, kept], pull_MM[:, kept]))
        wanted = torch.cat((x_TM @ w_OM.t(), pull_MM @ w_OM.t()))
        truth = torch.linalg.lstsq(rows, wanted).solution.t()
        assert weight_OK.shape == (5, width)
        torch.testing.assert_close(weight_OK, truth, rtol=1e-7, atol=1e-7)
        assert torch.equal(found[width].whole(60)[:, kept], weight_OK)
    assert torch.equal(found[60].weight_OK, w_OM)


def test_elimination_beats_keeping_the_largest() -> None:
    x_TM = activations(300, 40)
    w_OM = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    gram = x_TM.t() @ x_TM / 300
    chosen = eliminate(w_OM, gram, [20])[20].kept_K
    largest = (w_OM.norm(dim=0) * gram.diagonal().sqrt()).topk(20).indices.sort().values

    def error(kept: torch.Tensor) -> float:
        fit = torch.linalg.lstsq(x_TM[:, kept], x_TM @ w_OM.t()).solution
        return float((x_TM[:, kept] @ fit - x_TM @ w_OM.t()).square().sum())

    assert error(chosen) < error(largest)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_renumbered_neurons_are_the_same_model(architecture: str) -> None:
    model, dense = tiny_model(architecture), tiny_model(architecture)
    for mlp in find_mlps(model, find_layers(model)):
        neurons = torch.randperm(mlp.width, generator=torch.Generator().manual_seed(3))
        down = dense_weight(model.get_submodule(mlp.down))
        keep_neurons(model, mlp, neurons, down[:, neurons])
    assert distance(model, dense) < 1e-5


def test_neurons_are_renumbered_where_groups_choose_their_channels() -> None:
    """Neurons of one kind scattered over the groups: put together again, little is lost."""
    model = tiny_model("llama", num_hidden_layers=1)
    mlp = model.model.layers[0].mlp
    kind = torch.arange(96) % 4
    reads = torch.arange(48) // 12 == kind[:, None]
    with torch.no_grad():
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight.mul_(reads)
    rule = {"match": "*.mlp.*", "structure": "grouped_pointwise", "groups": 4}
    recipe = {"init": "least_squares", "replace": [{**rule, "channel_order": "learned"}]}
    report = llmslim.slim(model, recipe, calibration=WINDOWS)
    errors = [r.init_error for r in report.rows if r.name.endswith(("gate_proj", "up_proj"))]
    assert len(errors) == 2
    assert max(errors) < 1e-6
