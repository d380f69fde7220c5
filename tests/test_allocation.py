"""`structure: auto`: what is chosen, against brute force; and narrower MLPs with blocks in them."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_checkpoint import tiny_tokenizer
from tiny import ARCHITECTURES, few, logits, tiny_model, tokens

import llmslim
from llmslim import RecipeError, SlimError, fitting, planning
from llmslim.anatomy.layer_calls import TailModel, record_calls, run_layer
from llmslim.anatomy.roles import find_roles
from llmslim.anatomy.sites import find_layers
from llmslim.data import Windows
from llmslim.fitting import allocation
from llmslim.fitting.allocation import Candidate, choose
from llmslim.fitting.moments import Moments
from llmslim.modeling.pivoted_low_rank import PivotedLowRank
from llmslim.recipe import Recipe, rules_by_name

CALIBRATION = fitting.TokenWindows(tokens(64, 16), tokens(8, 16, seed=5))
WINDOWS = Windows(CALIBRATION.windows, "random tokens", CALIBRATION.held_out)
AUTO_MLP: dict[str, Any] = {"match": "*.mlp.*", "structure": "auto"}


@pytest.fixture(autouse=True)
def in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run layers in float32 whatever the processor is fast at."""
    for module in ("layerwise", "allocation"):
        monkeypatch.setattr(f"llmslim.fitting.{module}.fast_type", lambda *_: None)


def weights_of(report: Any, ending: str = "") -> tuple[int, int]:
    rows = [r for r in report.rows if ".mlp." in r.name and r.name.endswith(ending)]
    return sum(r.params_before for r in rows), sum(r.params_after for r in rows)


def random_candidates(seed: int) -> list[list[Candidate]]:
    draw = random.Random(seed)
    return [
        [
            Candidate("x", share, int(share * size), draw.random() * (1 - share))
            for share in (0.25, 0.5, 0.75, 1.0)
        ]
        for size in (draw.choice((100, 400, 900)) for _ in range(5))
    ]


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_there_is(seed: int) -> None:
    candidates = random_candidates(seed)
    budget = sum(c[-1].weights for c in candidates) // 2
    picks = choose(candidates, budget)
    assert picks is not None
    assert all(pick in choices for pick, choices in zip(picks, candidates, strict=True))
    assert sum(pick.weights for pick in picks) <= budget
    best = min(
        sum(c.loss for c in combination)
        for combination in itertools.product(*candidates)
        if sum(c.weights for c in combination) <= budget
    )
    assert sum(pick.loss for pick in picks) == pytest.approx(best, rel=1e-3)


def test_no_choice_is_said_so() -> None:
    assert choose(random_candidates(0), 10) is None
    assert choose([], 10) == []


@pytest.mark.parametrize("architecture", few(ARCHITECTURES))
def test_running_from_any_layer_gives_the_models_logits(architecture: str) -> None:
    model, ids = tiny_model(architecture), tokens(1, 12)
    layers = list(model.get_submodule(find_layers(model).path))
    calls = record_calls(model, layers, [ids])
    hidden, expected = calls.hidden[0], logits(model, ids)
    for index, layer in enumerate(layers):
        found = TailModel(model, layers, ids).logits(index, hidden, ids)
        assert torch.allclose(found, expected, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            after, _ = run_layer(layer, hidden, calls.extras[index][0])
        assert after is not None
        hidden = after


@pytest.mark.parametrize("architecture", few(["llama", "phi3", "gpt2", "opt"]))
def test_the_budget_is_used_and_kept_and_the_model_left_alone(architecture: str) -> None:
    model = tiny_model(architecture)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rule = {"match": ["*.mlp.*", "*.fc1", "*.fc2", "*attn*"], "structure": "auto"}
    recipe = Recipe.of({"budget": 0.5, "replace": [rule]})
    chosen = fitting.allocate(model, recipe, CALIBRATION)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not chosen.has_auto
    made = planning.plan(model, chosen)
    rows = [row for row in made.report().rows if row.kind == "projection"]
    dense = sum(row.in_features * row.out_features for row in rows)
    left = sum(row.params_after for row in rows) - sum(
        row.params_before - row.in_features * row.out_features for row in rows
    )
    assert 0.45 * dense < left <= 0.5 * dense + 1e-9 * dense + 400  # biases of dropped neurons


def test_layers_that_matter_keep_more() -> None:
    """Where three of four MLPs write next to nothing, the fourth keeps its neurons."""
    model = tiny_model("llama")
    with torch.no_grad():
        for index in (0, 1, 3):
            model.model.layers[index].mlp.down_proj.weight.mul_(0.01)
    chosen = fitting.allocate(model, Recipe.of({"budget": 0.5, "replace": [AUTO_MLP]}), CALIBRATION)
    report = planning.plan(model, chosen).report()
    share = {
        index: weights_of(report, f"layers.{index}.mlp.down_proj")[1] / (48 * 96)
        for index in range(4)
    }
    assert share[2] == 1.0
    assert max(share[index] for index in (0, 1, 3)) < 0.75


def test_what_counts_is_the_predictions_and_not_the_size_of_outputs() -> None:
    """Queries made smaller and keys larger: the same model, so the same choice."""
    chosen = []
    for factor in (1, 2**7):
        model = tiny_model("llama", num_hidden_layers=2)
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.div_(factor)
            model.model.layers[0].self_attn.k_proj.weight.mul_(factor)
        rule = {"match": "*.self_attn.*", "structure": "auto"}
        recipe = Recipe.of({"budget": 0.5, "replace": [rule]})
        chosen.append(fitting.allocate(model, recipe, CALIBRATION).replace)
    assert chosen[0] == chosen[1]


def test_layers_that_go_have_no_share_in_the_budget() -> None:
    recipe = Recipe.of({"budget": 0.5, "depth": {"keep_layers": [0, 3]}, "replace": [AUTO_MLP]})
    model = tiny_model("llama")
    chosen = fitting.allocate(model, recipe, CALIBRATION)
    names = [name for rule in chosen.replace for name in rule.globs]
    assert {name.split(".")[2] for name in names} == {"0", "3"}
    report = planning.plan(model, chosen).report()
    left = sum(weights_of(report, f"layers.{n}.mlp.down_proj")[1] for n in (0, 3))
    assert 0.4 * 2 * 48 * 96 < left <= 0.5 * 2 * 48 * 96


def test_measured_shares_beat_even_ones() -> None:
    model, even, dense = (tiny_model("llama") for _ in range(3))
    for each in (model, even, dense):
        with torch.no_grad():
            for index in (0, 3):
                each.model.layers[index].mlp.down_proj.weight.mul_(0.05)
    llmslim.slim(model, {"budget": 0.5, "replace": [AUTO_MLP]}, calibration=WINDOWS)
    rule = {"match": "*.mlp.*", "structure": "width", "keep_ratio": 0.5}
    llmslim.slim(even, {"init": "least_squares", "replace": [rule]}, calibration=WINDOWS)
    ids = tokens(8, 16, seed=9)
    expected = logits(dense, ids)
    error = [float((logits(each, ids) - expected).norm()) for each in (model, even)]
    assert error[0] < 0.8 * error[1]


def test_a_budget_too_small_is_an_error_that_says_what_is_possible() -> None:
    recipe = Recipe.of({"budget": 0.01, "replace": [AUTO_MLP]})
    with pytest.raises(RecipeError, match=r"budget: 0\.01.* 0\.06"):
        fitting.allocate(tiny_model("llama"), recipe, CALIBRATION)


def test_tokens_whose_activations_overflow_are_passed_over() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("inf")
    windows = (CALIBRATION.windows, CALIBRATION.held_out)
    assert all(0 < int((ids == 7).any(dim=1).sum()) < len(ids) for ids in windows)
    recipe = Recipe.of({"budget": 0.5, "replace": [AUTO_MLP]})
    chosen = fitting.allocate(model, recipe, CALIBRATION)
    shares = [rule.keep_ratio for rule in chosen.replace]
    assert len(set(shares)) > 1  # layers differ
    report = fitting.rewrite(model, planning.plan(model, chosen), calibration=CALIBRATION)
    errors = [row.init_error for row in report.rows if row.init_error is not None]
    assert errors
    assert all(0 <= error < 1.5 for error in errors)


def test_a_plan_spreads_evenly_and_says_so() -> None:
    made = llmslim.plan(tiny_model("llama"), {"budget": 0.5, "replace": [AUTO_MLP]})
    assert made.needs_calibration
    report = made.report()
    before, after = weights_of(report)
    assert after * 2 == before
    assert any(note.startswith("structure auto:") for note in report.problems)


def test_without_data_auto_is_spread_evenly() -> None:
    model = tiny_model("llama")
    recipe = {"budget": 0.5, "init": "project", "replace": [AUTO_MLP]}
    report = llmslim.slim(model, recipe)
    assert model.config.intermediate_size == 48
    assert weights_of(report)[1] * 2 == weights_of(report)[0]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"replace": [AUTO_MLP]}, "`structure: auto` .*`budget`"),
        (
            {"budget": 0.5, "replace": [{"match": "*", "structure": "low_rank", "rank": 4}]},
            "`budget` .*`structure: auto`",
        ),
        ({"budget": 0.5, "replace": [{**AUTO_MLP, "rank": 4}]}, r"\.rank: "),
        (
            {"budget": 0.5, "replace": [{**AUTO_MLP, "neurons": 0.5}]},
            r"\.neurons: .* auto",
        ),
        (
            {"budget": 0.5, "replace": [{**AUTO_MLP, "match": "*.mpl.*"}]},
            r"\.match: \*\.mpl\.\* ",
        ),
        (
            {
                "replace": [
                    {
                        "match": "*.mlp.*",
                        "structure": "low_rank",
                        "neurons": 0.5,
                        "keep_ratio": 0.75,
                    }
                ]
            },
            r"\.keep_ratio: .* and 11 ",
        ),
        (
            {
                "replace": [
                    {"match": "*.o_proj", "structure": "low_rank", "neurons": 0.5, "rank": 2}
                ]
            },
            r"\.neurons: .*o_proj and 3 ",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(SlimError, match=message):
        llmslim.plan(tiny_model("llama"), recipe)


def test_the_checkpoint_has_the_recipe_that_was_chosen(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    llmslim.save(model, tmp_path / "dense", tokenizer=tokenizer)
    recipe = {
        "name": "measured",
        "budget": 0.5,
        "replace": [AUTO_MLP],
        "calibration": {"tokens": 512, "sequence_length": 16},
    }
    made = llmslim.convert(tmp_path / "dense", recipe, tmp_path / "slim")
    written = yaml.safe_load((tmp_path / "slim" / "recipe.yaml").read_text())
    assert "budget" not in written
    assert {rule.get("structure") for rule in written["replace"]} <= {"width", None}
    again = llmslim.plan(tmp_path / "dense", tmp_path / "slim" / "recipe.yaml").report()
    assert again.totals.params_after == made.report.totals.params_after
    assert not any("structure auto" in note for note in made.report.problems)


@pytest.mark.parametrize("structure", ["low_rank", "pivoted_low_rank", "grouped_pointwise"])
def test_narrower_and_structured_share_one_budget(structure: str) -> None:
    rule = {"match": "*.mlp.*", "structure": structure, "neurons": 0.75, "keep_ratio": 0.375}
    model = tiny_model("llama")
    report = llmslim.slim(model, {"init": "least_squares", "replace": [rule]}, calibration=WINDOWS)
    before, after = weights_of(report)
    assert 0.33 * before < after <= 0.375 * before
    block = model.model.layers[0].mlp.down_proj
    assert (block.in_features, block.out_features) == (72, 48)
    assert type(block).__name__ != "Linear"
    errors = [row.init_error for row in report.rows if row.action == "replaced"]
    assert len(errors) == 12
    assert all(error is not None and 0 < error < 1 for error in errors)


def test_narrower_and_full_rank_loses_nothing_where_neurons_were_idle() -> None:
    """Half the neurons do nothing; without them, blocks of full rank are the dense model."""
    model, dense = tiny_model("llama"), tiny_model("llama")
    for each in (model, dense):
        with torch.no_grad():
            for layer in each.model.layers:
                layer.mlp.down_proj.weight[:, ::2] = 0
    rule = {"match": "*.mlp.*", "structure": "low_rank", "neurons": 0.5, "rank": 48}
    llmslim.slim(model, {"init": "least_squares", "replace": [rule]}, calibration=WINDOWS)
    ids = tokens(4, 16, seed=9)
    expected = logits(dense, ids)
    assert float((logits(model, ids) - expected).norm() / expected.norm()) < 1e-4


def with_an_idle_projection() -> Any:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.idle = torch.nn.Linear(48, 48, bias=False)
    return model


def test_auto_leaves_what_is_never_called() -> None:
    rule = {"match": ["*.mlp.*", "*.self_attn.*"], "structure": "auto"}
    recipe = Recipe.of({"budget": 0.7, "replace": [rule]})
    chosen = fitting.allocate(with_an_idle_projection(), recipe, CALIBRATION)
    kept = {name for rule in chosen.replace if rule.keep for name in rule.globs}
    assert {f"model.layers.{n}.self_attn.idle" for n in range(4)} <= kept


def test_what_is_never_called_is_fitted_without_data_and_said_so() -> None:
    rule = {"match": "*.self_attn.*", "structure": "low_rank", "rank": 4, "init": "least_squares"}
    model = with_an_idle_projection()
    weight = model.model.layers[2].self_attn.idle.weight.detach().clone()
    report = llmslim.slim(model, {"replace": [rule]}, calibration=WINDOWS)
    u, s, vh = torch.linalg.svd(weight.double())
    nearest = u[:, :4] * s[:4] @ vh[:4]
    block = model.model.layers[2].self_attn.idle.to_dense().double()
    torch.testing.assert_close(block, nearest, atol=1e-5, rtol=0)
    reported = [note for note in report.problems if "never called" in note]
    assert len(reported) == 1
    assert reported[0].startswith("model.layers.0.self_attn.idle and 3 more")


def measured(recipe: Recipe) -> tuple[Any, Any]:
    """Return what measures a model of one layer, and the first unit there is to decide."""
    model = tiny_model("llama", num_hidden_layers=1)
    units = allocation._find_units(model, recipe, rules_by_name(recipe, find_roles(model)))
    assert recipe.budget is not None
    measurement = allocation._Measurement(model, units, recipe.budget)
    measurement.record(CALIBRATION)
    return measurement, units[0]


@pytest.mark.parametrize(("glob", "inputs"), [("*.mlp.*", 96), ("*.o_proj", 48)])
def test_candidates_are_judged_on_other_tokens_than_their_fit(glob: str, inputs: int) -> None:
    """Truth: the probed candidate's own outputs on tokens it was not fitted to."""
    rule = {"match": glob, "structure": "auto"}
    measurement, unit = measured(Recipe.of({"budget": 0.3, "replace": [rule]}))
    moments = Moments.of(inputs, device=torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, inputs, generator=draw)
    other = 3 * torch.randn(200, inputs, generator=draw) * torch.rand(inputs, generator=draw)
    moments.fit.update(x)
    moments.held_out.update(other)
    if unit.ups:
        fits, candidate = measurement._narrowed(unit, moments)
    else:
        fits, candidate = measurement._structured(unit, moments, PivotedLowRank)
    share, error = fits[0].share, fits[0].loss
    assert share == 5 / 16  # the nearest to the budget
    kept = int((candidate != 0).any(0).sum()) if unit.ups else torch.linalg.matrix_rank(candidate)
    largest = int(inputs * share)  # of a pivoted low rank, more for as many weights
    assert kept == largest if unit.ups else 0 < kept < largest
    lost = other.double() @ (measurement._dense(unit.name).double() - candidate.double()).t()
    assert error == pytest.approx(float(lost.square().sum(1).mean()), rel=1e-5)


@torch.no_grad()
def test_a_candidates_loss_is_the_divergence_of_what_the_model_predicts() -> None:
    """Truth: the model itself with the probed weight in place, on the tokens held out."""
    rule = {"match": "*.mlp.*", "structure": "auto"}
    measurement, unit = measured(Recipe.of({"budget": 0.5, "replace": [rule]}))
    model = measurement.model
    moments, _ = measurement._walk(0, model.model.layers[0], [unit])
    fits, probe = measurement._narrowed(unit, moments[unit.name])
    errors = {each.share: each.loss for each in fits}
    found = measurement._with_losses(unit, fits, probe)
    expected = logits(model, CALIBRATION.held_out).log_softmax(-1)
    model.get_submodule(unit.name).weight.copy_(probe)
    got = logits(model, CALIBRATION.held_out).log_softmax(-1)
    lost = float((expected.exp() * (expected - got)).sum(-1).mean())
    (probed,) = [one for one in found if one.share == 0.5]
    assert probed.loss == pytest.approx(lost, rel=1e-3)
    for one in found:  # the others in proportion to their errors
        relative = errors[one.share] / errors[0.5]
        assert one.loss == pytest.approx(relative * lost, rel=1e-3)
