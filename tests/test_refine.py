"""The gradient fit after the closed forms: never worse, and better where it can be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import few, tiny_model, tokens
from torch import nn

import llmslim
from llmslim.data import Windows
from llmslim.fitting import layerwise, refine
from llmslim.fitting.layer_pair import LayerPair
from llmslim.fitting.refine import descend, only_moving, output_loss

WINDOWS = Windows(tokens(16, 64), "random tokens", tokens(8, 64, seed=5))
RULE: dict[str, Any] = {"match": "*.mlp.*", "structure": "width", "keep_ratio": 0.5}


@pytest.fixture(autouse=True)
def in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run layers in float32 whatever the processor is fast at."""
    monkeypatch.setattr(layerwise, "fast_type", lambda *_: None)


INPUTS = torch.randn(20, 1, 64, 8, generator=torch.Generator().manual_seed(1))


def test_descent_finds_a_linear_map() -> None:
    torch.manual_seed(0)
    truth, layer = nn.Linear(8, 8), nn.Linear(8, 8)
    wanted = [truth(x).detach() for x in INPUTS]
    before, after = descend(
        output_loss(lambda window: layer(INPUTS[window]), wanted),
        list(layer.parameters()),
        range(16),
        range(16, 20),
        each=16,
        steps=400,
        lr=0.05,
    )
    assert after < 1e-3 * before
    assert torch.allclose(layer.weight, truth.weight, atol=0.02)
    assert not any(p.grad is not None for p in layer.parameters())


def test_steps_that_lead_nowhere_are_taken_back() -> None:
    torch.manual_seed(0)
    truth, layer = nn.Linear(8, 8), nn.Linear(8, 8)
    layer.load_state_dict(truth.state_dict())
    with torch.no_grad():
        layer.weight.add_(1e-4)
    weight = layer.weight.detach().clone()
    before, after = descend(
        output_loss(lambda window: layer(INPUTS[window]), [truth(x).detach() for x in INPUTS]),
        [layer.weight],
        range(4),
        range(4, 6),
        each=4,
        steps=5,
        lr=10.0,
    )
    assert after == before
    assert torch.equal(layer.weight, weight)


def test_steps_rise_in_a_tenth_of_them_and_fall_as_a_cosine() -> None:
    """On a slope that is the same everywhere, Adam's steps are the rate itself."""
    weight = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    met: list[float] = []

    def slope(_window: int) -> torch.Tensor:
        if torch.is_grad_enabled():
            met.append(float(weight[0].detach()))
        return weight.sum()

    descend(slope, [weight], [0], [0], each=1, steps=20, lr=0.01)
    taken = -torch.tensor([*met, float(weight[0].detach())]).diff() / (2 * 0.01)
    cosine = 0.5 * (1 + torch.cos(torch.pi * torch.arange(18) / 18))
    expected = torch.cat((torch.tensor([0.5, 1.0]), cosine))
    torch.testing.assert_close(taken, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "width"},
        {"structure": "low_rank"},
        {"structure": "block_shuffle"},
        {"structure": "grouped_low_rank"},
        {"structure": "pivoted_low_rank"},
        {"structure": "grouped_pointwise"},
        {"structure": "grouped_pointwise", "channel_order": "learned"},
    ],
    ids=lambda options: "-".join(options.values()),
)
@pytest.mark.parametrize("architecture", few(["llama", "phi3"], ["llama"]))
def test_a_refined_layer_is_nearer_on_held_out_tokens(
    architecture: str, options: dict[str, Any]
) -> None:
    """The first layer sees the same inputs either way; later ones follow what came before."""
    rule = {"match": "*.mlp.*", "keep_ratio": 0.5, **options}
    recipe = {"init": "least_squares", "replace": [rule]}
    first = []
    for extra in ({}, {"refine": {"steps": 16, "lr": 0.02}}):
        model = tiny_model(architecture, num_hidden_layers=2)
        report = llmslim.slim(model, {**recipe, **extra}, calibration=WINDOWS)
        first.append(next(r.init_error for r in report.rows if r.name.endswith("down_proj")))
    assert first[1] < 0.97 * first[0]


def test_only_what_was_planned_moves() -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    recipe = {"init": "least_squares", "refine": {"steps": 8}, "replace": [RULE]}
    llmslim.slim(model, recipe, calibration=WINDOWS)
    ours, theirs = model.state_dict(), dense.state_dict()
    same = [name for name in theirs if ".mlp." not in name]
    assert len(same) > 20
    assert all(torch.equal(ours[name], theirs[name]) for name in same)
    assert all(p.requires_grad for p in model.parameters())


def test_bfloat16_weights_are_refined_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: set[torch.dtype] = set()

    def noted(loss: Any, parameters: Any, *args: Any, **options: Any) -> Any:
        moved.update(p.dtype for p in parameters)
        return descend(loss, parameters, *args, **options)

    monkeypatch.setattr(refine, "descend", noted)
    recipe = {"init": "least_squares", "replace": [RULE]}
    errors = []
    for extra in ({}, {"refine": {"steps": 10, "lr": 0.02}}):
        model = tiny_model("llama").to(torch.bfloat16)
        report = llmslim.slim(model, {**recipe, **extra}, calibration=WINDOWS)
        errors.append(sum(r.init_error for r in report.rows if r.init_error is not None))
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert errors[1] < errors[0]
    assert moved == {torch.float32}


@pytest.mark.parametrize(
    ("architecture", "rule", "end"),
    [
        ("llama", RULE, "mlp"),
        ("phi3", RULE, "mlp"),
        ("gpt_neox", RULE, "mlp"),  # beside the attention
        ("llama", RULE | {"match": "*.down_proj", "structure": "low_rank"}, "mlp.down_proj"),
        ("llama", RULE | {"match": "*.up_proj", "structure": "low_rank"}, "mlp"),
        ("llama", RULE | {"match": "*_proj", "structure": "low_rank"}, None),  # attention, too
        ("opt", RULE | {"match": "*.fc*"}, None),  # no module holds the MLP alone
        ("bloom", RULE, None),  # the MLP is given the stream, too, and adds to it
    ],
)
def test_running_the_end_of_a_layer_is_running_the_layer(
    monkeypatch: pytest.MonkeyPatch, architecture: str, rule: dict[str, Any], end: str | None
) -> None:
    """Truth: the same descent with every step through the whole layer."""
    recipe = {"init": "least_squares", "refine": {"steps": 8}, "replace": [rule]}
    ends: list[Any] = []
    tail = LayerPair.tail

    def noted(pair: LayerPair, names: Any) -> Any:
        found = tail(pair, names)
        modules = {module: name for name, module in pair.slim.named_modules()}
        ends.append(found and modules[found.module])
        return found

    monkeypatch.setattr(LayerPair, "tail", noted)
    model = tiny_model(architecture, num_hidden_layers=2)
    report = llmslim.slim(model, recipe, calibration=WINDOWS)
    assert ends == [end, end]
    monkeypatch.setattr(LayerPair, "tail", lambda _pair, _names: None)
    whole = tiny_model(architecture, num_hidden_layers=2)
    truth = llmslim.slim(whole, recipe, calibration=WINDOWS)
    expected = whole.state_dict()
    for name, weights in model.state_dict().items():
        torch.testing.assert_close(weights, expected[name], rtol=1e-3, atol=1e-4)
    errors = [row.init_error for row in report.rows if row.init_error is not None]
    assert errors
    assert errors == pytest.approx(
        [e for r in truth.rows if (e := r.init_error) is not None], rel=1e-2
    )


def test_an_end_that_is_given_more_features_than_it_adds_is_not_run_alone() -> None:
    """What stands in for a module that holds projections gives as much as it is given."""
    model = tiny_model("llama", num_hidden_layers=2)
    for layer in model.model.layers:
        layer.mlp.down_proj = nn.Sequential(nn.Linear(96, 96, bias=False), layer.mlp.down_proj)
    rule = {"match": "*.down_proj.*", "structure": "low_rank", "rank": 20}
    recipe = {"init": "least_squares", "refine": {"steps": 8}, "replace": [rule]}
    plain = copy.deepcopy(model)
    report = llmslim.slim(model, recipe, calibration=WINDOWS)
    truth = llmslim.slim(plain, {**recipe, "refine": None}, calibration=WINDOWS)
    name = "model.layers.0.mlp.down_proj.1"
    (refined,), (closed,) = ([r for r in found.rows if r.name == name] for found in (report, truth))
    assert refined.init_error < closed.init_error


def test_what_was_frozen_stays_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with only_moving(model, [model[0].weight]):
        assert [p.requires_grad for p in model.parameters()] == [True, False, False, False]
    assert [p.requires_grad for p in model.parameters()] == before
