"""The judge of benchmarks/sweep.py: what it takes for true, and what it finds at fault."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from six_layers import Subject, inputs, subjects
from transformers import GPT2LMHeadModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llmslim
from llmslim import api

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from _judge import CHANGES, Bench, Case, logits
from _truth import Truth, UndefinedError, difference

pytestmark = pytest.mark.filterwarnings("ignore")  # what other people's models warn of
SCALED = {"scale_attn_by_inverse_layer_idx": True}


def test_every_model_has_a_name_of_its_own() -> None:
    found = subjects()
    assert len({subject.name for subject in found}) == len(found)
    assert {subject.model_type for subject in found} <= set(CONFIG_MAPPING)
    assert [s.name for s in subjects(("gpt2 *",))] == [
        "gpt2 scale_attn_by_inverse_layer_idx=True",
        "gpt2 scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True",
    ]


@torch.no_grad()
def by_hand(model: Any, keep: list[int]) -> torch.Tensor:
    """Return what GPT-2 says with some of its blocks, called one after the other."""
    ids = inputs(model)["input_ids"]
    hidden = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(ids.shape[1]))
    for index in keep:
        hidden = model.transformer.h[index](hidden)
    found: torch.Tensor = model.lm_head(model.transformer.ln_f(hidden))
    return found


@pytest.mark.parametrize("extra", [{}, SCALED])
def test_layers_let_through_are_layers_left_out(extra: dict[str, Any]) -> None:
    model = Subject("gpt2", "causal", extra).model()
    assert isinstance(model, GPT2LMHeadModel)
    truth, dense = Truth(model, logits), logits(model)
    assert truth.path == "transformer.h"
    assert difference(by_hand(model, list(range(6))), dense) < 1e-5
    assert difference(truth.skipping([1, 2, 4]), by_hand(model, [1, 2, 4])) < 1e-5
    assert difference(truth.in_order([3, 0]), by_hand(model, [3, 0])) < 1e-5
    assert difference(by_hand(model, [3, 0]), by_hand(model, [0, 3])) > 0.01
    # The model is as it was.
    assert torch.equal(logits(model), dense)


def test_no_truth_where_layers_hand_each_other_more() -> None:
    truth = Truth(Subject("zaya", "causal").model(), logits)
    assert difference(truth.skipping(range(6)), logits(truth.model)) == 0
    assert difference(truth.skipping([0, 1, 3]), logits(truth.model)) > 0.01
    with pytest.raises(UndefinedError):
        truth.in_order([3, 0])


def test_the_decoder_is_the_one_that_runs() -> None:
    assert Truth(Subject("idefics", "image").model(), logits).path == "model.layers"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(Subject("llama", "causal"), tmp_path)
    assert bench.set_up() == ""
    return bench


def outcomes(cases: list[Case]) -> list[str]:
    assert [case.way for case in cases] == ["save", "convert"]
    return [case.outcome for case in cases]


@pytest.mark.parametrize(
    ("change", "known"),
    [
        ("width, more", True),
        pytest.param("depth, reordered", True, marks=pytest.mark.slow),
        pytest.param("depth, width, structure", False, marks=pytest.mark.slow),
    ],
)
def test_what_a_model_can_take_is_the_same(bench: Bench, change: str, known: bool) -> None:
    assert set(bench.recipes) == set(CHANGES)
    cases = bench.judge(change)
    assert outcomes(cases) == ["same", "same"], cases
    assert [case.truth is not None for case in cases] == [known, known]


def test_a_weight_that_is_not_written_is_a_fault(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(self: Any, path: Path, write: Any = PreTrainedModel.save_pretrained) -> None:
        state = self.state_dict()
        del state["model.layers.1.mlp.up_proj.weight"]
        write(self, path, state_dict=state)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", forgetful)
    save, _ = bench.judge("depth, a count")
    assert save.outcome == "fault"
    assert "1 missing keys (model.layers.1.mlp.up_proj.weight)" in save.detail


def test_another_function_is_a_fault(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(model: Any, recipe: Any) -> Any:
        report = api.slim(model, recipe)
        model.model.norm.weight.data[0] += 0.5
        return report

    monkeypatch.setattr(llmslim, "slim", off)
    save, convert = bench.judge("depth, a list")
    assert outcomes([save, convert]) == ["fault", "fault"]
    assert save.difference == 0
    assert save.truth is not None
    assert save.truth > 1e-3
    assert convert.difference is not None
    assert convert.difference > 1e-3


def test_layers_that_share_a_place_in_the_cache_are_a_fault(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(model: Any, recipe: Any) -> Any:
        report = api.slim(model, recipe)
        model.model.layers[1].self_attn.layer_idx = 0
        return report

    monkeypatch.setattr(llmslim, "slim", off)
    save, _ = bench.judge("depth, a list")
    assert (save.outcome, save.difference, save.truth) == ("fault", 0, 0)
    assert "with a cache" in save.detail


def test_an_error_after_the_plan_is_a_fault(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(llmslim, "convert", broken)
    cases = bench.judge("structure")
    assert outcomes(cases) == ["same", "fault"]
    assert cases[1].detail == "error after the plan: RuntimeError: no"


def test_what_the_plan_refuses_stays_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(Subject("mamba", "causal"), tmp_path)
    assert bench.set_up() == ""
    assert outcomes(bench.judge("width, more")) == ["refused", "refused"]
    monkeypatch.setattr(llmslim, "convert", lambda *_: None)
    cases = bench.judge("width, more")
    assert outcomes(cases) == ["refused", "fault"]
    assert cases[1].detail.startswith("plan refuses, convert does not")


def test_what_transformers_does_not_build_is_not_judged(tmp_path: Path) -> None:
    told = Bench(Subject("gemma4_assistant", "causal"), tmp_path).set_up()
    assert told.startswith("no tiny model: StrictDataclassClassValidationError")
