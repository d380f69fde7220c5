"""Training end to end: the right divergence, less of it, and nothing moved that must not."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import few, logits, tiny_model, tokens
from torch import nn
from torch.nn.functional import kl_div

import llmslim
from llmslim import fitting, planning
from llmslim.fitting import apply, layerwise
from llmslim.fitting.end_to_end import Trained, train_end_to_end, trained_parameters
from llmslim.fitting.layer_store import DenseStates
from llmslim.recipe import EndToEnd, Recipe

LENGTH = 48
IDS, HELD_OUT = tokens(32, LENGTH), tokens(4, LENGTH, seed=5)
WIDTH: dict[str, Any] = {"match": "*.mlp.*", "structure": "width", "keep_ratio": 0.5}
LOW_RANK: dict[str, Any] = {"match": "*.mlp.*", "structure": "low_rank", "keep_ratio": 0.5}


@pytest.fixture(autouse=True)
def in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run layers in float32 whatever the processor is fast at."""
    monkeypatch.setattr(layerwise, "fast_type", lambda *_: None)


def recipe(*rules: dict[str, Any], steps: int = 16, **more: Any) -> Recipe:
    refine: Any = {"steps": 0, "end_to_end": {"steps": steps, "lr": 0.02, "tokens": 4 * LENGTH}}
    made = {"name": "tiny", "init": "least_squares", "replace": rules or (WIDTH,)}
    return Recipe.of(made | {"refine": refine} | more)


def divergence(slim: Any, dense: Any, ids: torch.Tensor) -> float:
    """Return KL(dense || slim) in nats per token, of whole models."""
    ours, theirs = (logits(model, ids).double().log_softmax(-1) for model in (slim, dense))
    return float(kl_div(ours, theirs, reduction="sum", log_target=True)) / ids.numel()


def before_training(
    model: Any, spec: Recipe, monkeypatch: pytest.MonkeyPatch
) -> tuple[planning.Plan, DenseStates, nn.Module]:
    """Fit a model, stop before it is trained as a whole, and disturb what was fitted."""
    seen: dict[str, Any] = {}

    def stop(_model: Any, plan: Any, _spec: Any, states: Any, *, head: Any, **_: Any) -> Trained:
        seen.update(plan=plan, states=states, head=head)
        return Trained(0, 0, 0)

    with monkeypatch.context() as patch:
        patch.setattr(apply, "train_end_to_end", stop)
        plan = planning.plan(model, spec)
        fitting.rewrite(model, plan, calibration=fitting.TokenWindows(IDS, HELD_OUT))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trained_parameters(model, seen["plan"]):
            if "norm" not in name and "ln_" not in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * parameter.std().nan_to_num(), alpha=0.3)
    return seen["plan"], seen["states"], seen["head"]


@pytest.mark.parametrize(
    "architecture",
    few(["llama", "phi3", "gpt2", "bloom", "gemma2", "cohere"], ["gpt2", "gemma2", "cohere"]),
)
def test_what_becomes_less_is_the_divergence_of_whole_models(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 2 caps logits, Cohere scales them: code around the head counts."""
    dense, model = tiny_model(architecture), tiny_model(architecture)
    plan, states, head = before_training(model, recipe(), monkeypatch)
    before = divergence(model, dense, HELD_OUT)
    spec = plan.recipe.refine.end_to_end
    trained = train_end_to_end(model, plan, spec, states, head=head)
    assert trained.before == pytest.approx(before, rel=1e-3)
    assert trained.after == pytest.approx(divergence(model, dense, HELD_OUT), rel=1e-3)
    assert trained.after < 0.9 * trained.before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["phi3", "gpt2"])
def test_with_products_of_bfloat16_as_well(
    architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on processors that are fast at them: most weights then stay as narrow as they are."""
    monkeypatch.setattr(layerwise, "fast_type", lambda *_: torch.bfloat16)
    dense, model = (tiny_model(architecture).to(dtype) for _ in range(2))
    plan, states, head = before_training(model, recipe(), monkeypatch)
    before = divergence(model, dense, HELD_OUT)
    trained = train_end_to_end(model, plan, plan.recipe.refine.end_to_end, states, head=head)
    assert trained.before == pytest.approx(before, rel=0.05)
    assert divergence(model, dense, HELD_OUT) == pytest.approx(trained.after, rel=0.05)
    assert trained.after < 0.9 * trained.before


def test_fewer_layers_and_another_head_are_held_against_the_dense_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head_rule = {"match": "lm_head", "structure": "low_rank", "keep_ratio": 0.5, "init": "project"}
    spec = recipe(WIDTH, head_rule, depth={"keep_layers": [0, 1, 3]})
    dense, model = tiny_model("llama"), tiny_model("llama")
    plan, states, head = before_training(model, spec, monkeypatch)
    before = divergence(model, dense, HELD_OUT)
    trained = train_end_to_end(model, plan, spec.refine.end_to_end, states, head=head)
    assert trained.before == pytest.approx(before, rel=1e-3)
    assert trained.after == pytest.approx(divergence(model, dense, HELD_OUT), rel=1e-3)
    assert trained.after < trained.before


@pytest.mark.parametrize("keep_layers", [None, [0, 1, 3]])
def test_half_of_the_text_is_kept_from_the_layers(
    keep_layers: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truths: a fit to the first half alone, and what the dense model's last layer gives."""
    dense, model, other = (tiny_model("llama") for _ in range(3))
    depth = {"depth": {"keep_layers": keep_layers}} if keep_layers else {}
    seen: dict[str, Any] = {}

    def stop(made: Any, _plan: Any, _spec: Any, states: DenseStates, **_: Any) -> Trained:
        seen.update(weights=copy.deepcopy(made.state_dict()), states=states)
        return Trained(0, 0, 0)

    monkeypatch.setattr(apply, "train_end_to_end", stop)
    plan = planning.plan(model, recipe(**depth))
    fitting.rewrite(model, plan, calibration=fitting.TokenWindows(IDS, HELD_OUT))
    plain = planning.plan(other, recipe(refine=None, **depth))
    half = fitting.TokenWindows(IDS[: len(IDS) // 2], HELD_OUT)
    fitting.rewrite(other, plain, calibration=half)
    assert all(torch.equal(seen["weights"][name], v) for name, v in other.state_dict().items())

    states = seen["states"]
    assert states.fitting == len(IDS)
    assert torch.equal(torch.cat(states.ids), torch.cat((IDS, HELD_OUT)))
    outputs: list[torch.Tensor] = []
    layer = dense.model.layers[-1]
    layer.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    with torch.no_grad():
        for ids in states.ids:
            dense(ids)
    for ours, theirs in zip(states.hidden, outputs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_layers_after_the_last_block_count(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model = tiny_model("llama"), tiny_model("llama")
    spec = recipe(WIDTH | {"match": "*.1.mlp.*"})
    plan, states, head = before_training(model, spec, monkeypatch)
    before = divergence(model, dense, HELD_OUT)
    trained = train_end_to_end(model, plan, spec.refine.end_to_end, states, head=head)
    assert trained.before == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [WIDTH, LOW_RANK], ids=["width", "low_rank"])
def test_what_was_planned_and_norms_move_and_nothing_else(
    rule: dict[str, Any], dtype: torch.dtype
) -> None:
    dense, model = tiny_model("llama").to(dtype), tiny_model("llama").to(dtype)
    windows = llmslim.data.Windows(IDS, "random tokens", HELD_OUT)
    report = llmslim.slim(model, recipe(rule | {"keep_ratio": 0.2}, steps=8), calibration=windows)
    ours, theirs = model.state_dict(), dense.state_dict()
    moved = {name for name in ours if not torch.equal(ours[name], theirs.get(name, ours[name][:0]))}
    assert not [name for name in moved if ".mlp." not in name and "norm" not in name]
    assert [name for name in moved if "norm" in name]
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.training
    assert any("end to end" in problem for problem in report.problems)


def test_recomputing_saves_memory_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny_model("llama")
    plan, states, _ = before_training(first, recipe(), monkeypatch)
    second = copy.deepcopy(first)
    spec = EndToEnd(steps=3, tokens=2 * LENGTH)
    kept: list[int] = []
    for model, recompute in ((first, False), (second, True)):
        sizes: list[int] = []

        def save(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            train_end_to_end(model, plan, spec, states, recompute=recompute)
        kept.append(sum(sizes))
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert kept[1] < kept[0]


def test_a_training_goes_on_from_a_snapshot_as_if_it_had_not_been_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = tiny_model("llama")
    plan, states, _ = before_training(whole, recipe(), monkeypatch)
    parts = copy.deepcopy(whole)
    spec = EndToEnd(steps=16, tokens=3 * LENGTH)
    snapshots: list[dict[str, torch.Tensor]] = []

    def save(snapshot: dict[str, torch.Tensor]) -> None:
        snapshots.append({name: tensor.clone() for name, tensor in snapshot.items()})

    wanted = train_end_to_end(whole, plan, spec, states, save=save)
    assert len(snapshots) == 7
    found = train_end_to_end(parts, plan, spec, states, saved=snapshots[3])
    assert found == wanted
    assert all(map(torch.equal, whole.parameters(), parts.parameters()))


def test_what_makes_it_worse_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    plan, states, _ = before_training(model, recipe(), monkeypatch)
    before = copy.deepcopy(model.state_dict())
    trained = train_end_to_end(model, plan, EndToEnd(steps=4, lr=100.0), states)
    assert trained.after == trained.before
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_names_of_what_is_trained_follow_fewer_layers() -> None:
    model = tiny_model("llama")
    plan = planning.plan(model, recipe(depth={"keep_layers": [0, 3]}))
    fitting.rewrite(
        model,
        replace(plan, recipe=plan.recipe.model_copy(update={"refine": None})),
        calibration=fitting.TokenWindows(IDS, HELD_OUT),
    )
    names = {name for name, _ in trained_parameters(model, plan)}
    mlps = {f"model.layers.{n}.mlp.{m}_proj.weight" for n in (0, 1) for m in ("gate", "up", "down")}
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    assert names == mlps | norms
