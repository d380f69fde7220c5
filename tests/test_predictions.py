"""A descent on what the rest of the model predicts: the right divergence, and less of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import logits, tiny_model, tokens
from torch.nn.functional import kl_div

import llmslim
from llmslim import fitting
from llmslim.anatomy.layer_calls import record_calls, run_layer
from llmslim.anatomy.sites import find_layers
from llmslim.data import Windows
from llmslim.fitting import layerwise
from llmslim.fitting.predictions import Predictions

WINDOWS = Windows(tokens(96, 64), "random tokens", tokens(8, 64, seed=5))
FEW = Windows(tokens(4, 64), "random tokens", tokens(1, 64, seed=5))
RULE: dict[str, Any] = {"match": "*.mlp.*", "structure": "low_rank", "keep_ratio": 0.5}


@pytest.fixture(autouse=True)
def in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run layers in float32 whatever the processor is fast at."""
    monkeypatch.setattr(layerwise, "fast_type", lambda *_: None)


def divergence(slim: Any, dense: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return KL(dense || slim) over all tokens, of whole models."""
    ours, theirs = (logits(model, ids).log_softmax(-1) for model in (slim, dense))
    return kl_div(ours, theirs, reduction="sum", log_target=True)


def changed(layer: Any) -> None:
    """Change a layer's weights, in place."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.3 * float(parameter.std().nan_to_num()))


@pytest.mark.parametrize("gone", [[], [3], [1, 3]])
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2", "bloom"])
def test_the_loss_is_the_divergence_of_whole_models(architecture: str, gone: list[int]) -> None:
    """Truth: the model with one layer changed, and some taken out, next to the dense one."""
    dense = tiny_model(architecture)
    slim = copy.deepcopy(dense)
    path = find_layers(dense).path
    changed(slim.get_submodule(path)[2])
    short = copy.deepcopy(slim)
    stack = short.get_submodule(path)
    for index in reversed(gone):
        del stack[index]
    windows = list(tokens(4, 12).split(2))
    layers = list(slim.get_submodule(path))
    calls = record_calls(dense, list(dense.get_submodule(path)), windows)
    with torch.no_grad():
        made = Predictions(
            dense, list(dense.get_submodule(path)), calls, windows, frozenset(gone), None
        )
        streams = list(calls.hidden)
        for index in range(3):
            if index not in gone:
                streams = [
                    run_layer(layers[index], x, calls.extras[index][n])[0]  # type: ignore[misc]
                    for n, x in enumerate(streams)
                ]
        loss = made.loss(2, lambda n: streams[n])
        for n, ids in enumerate(windows):
            assert loss(n) == pytest.approx(float(divergence(short, dense, ids)), rel=1e-3)
        second = float(loss(1))
        made.drop_first(1)
        assert made.loss(2, lambda _n: streams[1])(0) == pytest.approx(second, rel=1e-6)


@pytest.mark.parametrize(
    ("architecture", "layer", "depth"),
    [
        ("gpt2", 2, None),
        ("llama", 2, {"keep_layers": [0, 1, 2]}),
        pytest.param("llama", 1, None, marks=pytest.mark.slow),
    ],
)
def test_predictions_are_nearer_on_held_out_text(
    architecture: str, layer: int, depth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one layer to fit, what is chosen on held-out tokens is the model that comes out."""
    monkeypatch.setattr(fitting.refine, "STEP_TOKENS", 256)
    found = []
    dense = tiny_model(architecture)
    rule = RULE | {"match": f"*.{layer}.mlp.*"}
    for more in (0, 60):
        refine = {"steps": 4, "logits_steps": more}
        recipe = {"init": "least_squares", "refine": refine, "replace": [rule], "depth": depth}
        model = tiny_model(architecture)
        llmslim.slim(model, recipe, calibration=WINDOWS)
        found.append(float(divergence(model, dense, WINDOWS.held_out)))
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert found[1] < 0.98 * found[0]


def test_only_what_was_planned_moves() -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    refine = {"steps": 2, "logits_steps": 8}
    llmslim.slim(
        model,
        {"init": "least_squares", "refine": refine, "replace": [RULE | {"match": "*.2.mlp.*"}]},
        calibration=FEW,
    )
    ours, theirs = model.state_dict(), dense.state_dict()
    same = [name for name in theirs if ".2.mlp." not in name]
    assert len(same) > 20
    assert all(torch.equal(ours[name], theirs[name]) for name in same)


def test_no_gradient_is_left_on_what_stays() -> None:
    """A whole layer is run where attention is fitted, too: its norms take part and do not move."""
    model = tiny_model("llama")
    rule = {"match": "*_proj", "structure": "low_rank", "keep_ratio": 0.5}
    recipe = {"init": "least_squares", "refine": {"steps": 2}, "replace": [rule]}
    llmslim.slim(model, recipe, calibration=FEW)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
