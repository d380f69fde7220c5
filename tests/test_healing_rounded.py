"""The loss that is reported is that of what is stored, and what was trained is in it."""

from __future__ import annotations

import json

import pytest
import torch
from helpers_checkpoint import stored, tiny_tokenizer
from helpers_healing import Rows, Text, healed, independent_loss, slimmed, text
from tiny import tiny_model
from transformers import AutoModelForCausalLM

import llmslim
from llmslim.errors import HealingError
from llmslim.healing.trainable import make_trainable
from llmslim.recipe import Heal

SMALL = {"learning_rate": 2e-4, "precision": "fp32", "epochs": 4, "evaluate_every": 2}


@pytest.mark.parametrize("train", ["all", "blocks", "lora"])
def test_small_steps_are_not_rounded_away(tmp_path, train):
    model, rows = slimmed(dtype=torch.bfloat16), text()
    before = independent_loss(slimmed(dtype=torch.bfloat16).float(), rows.held_out)
    report = healed(model, tmp_path / "w", rows, train=train, **SMALL)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    after = independent_loss(model.float(), rows.held_out)
    assert report.loss_before == pytest.approx(before, rel=1e-6)
    assert report.loss_after == pytest.approx(after, rel=1e-6)
    # In bfloat16 the nearest number to most weights is still the one they had.
    assert before - after > 0.7 * (before - report.loss_unrounded) > 0
    measured = [line["held_out_loss"] for line in report.history if "held_out_loss" in line]
    assert report.loss_after == pytest.approx(min(measured), rel=1e-6)
    assert any(f"from {report.loss_unrounded:.4f} to {after:.4f}" in note for note in report.notes)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_the_best_weights_are_the_best_of_those_that_would_be_stored(tmp_path, train):
    model = slimmed(dtype=torch.bfloat16)
    rows = Text(Rows(64, 1, step=5), Rows(4, 2))  # counts otherwise than what is held out
    options = {"epochs": 4, "evaluate_every": 1, "patience": 2, "precision": "fp32"}
    report = healed(model, tmp_path / "w", rows, train=train, **options)
    measured = [line["held_out_loss"] for line in report.history if "held_out_loss" in line]
    assert report.steps == measured.index(min(measured)) + 1 < len(measured)
    assert report.loss_after == pytest.approx(min(measured), rel=1e-6)
    assert independent_loss(model.float(), rows.held_out) == pytest.approx(min(measured), rel=1e-5)


def test_measuring_changes_nothing_of_the_training(tmp_path):
    often, once = (
        healed(slimmed(dtype=torch.bfloat16), tmp_path / str(n), evaluate_every=n, epochs=2)
        for n in (1, 8)
    )
    losses = [[line["loss"] for line in one.history if "loss" in line] for one in (often, once)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("train", ["all", "lora"])
def test_as_stored_is_for_a_while_only(train):
    model = slimmed(dtype=torch.bfloat16)
    trainable = make_trainable(model, Heal(train=train))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    ids = text().train.ids
    before, weights = model(ids).logits, {n: p.clone() for n, p in model.named_parameters()}
    with trainable.as_stored():
        meanwhile = model(ids).logits
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(model(ids).logits, before)
    trainable.finalise()
    assert torch.equal(model(ids).logits, meanwhile)
    trainable.release()
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.float()(ids).logits, meanwhile)


def test_what_is_too_large_for_its_type_is_an_error(tmp_path):
    model = slimmed(dtype=torch.float16)
    with pytest.raises(HealingError, match=r"1e\+06.* float16.*store_dtype"):
        healed(model, tmp_path / "w", train="all", learning_rate=1e6, precision="fp32")
    assert not (tmp_path / "w").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    llmslim.save(tiny_model().to(torch.bfloat16), path / "m", tokenizer=tiny_tokenizer())
    return path / "m"


@pytest.mark.parametrize(("train", "dtype"), [("lora", None), ("all", "float32")])
def test_a_folder_has_the_loss_that_its_report_says(folder, tmp_path, train, dtype):
    rows = Text(Rows(16, 1), Rows(4, 2))
    settings = {"train": train, "learning_rate": 1e-3, "precision": "fp32", "store_dtype": dtype}
    report = llmslim.heal(folder, tmp_path / "h", data=rows, settings=settings)
    said = json.loads((tmp_path / "h" / "llmslim_report.json").read_text())["healing"]
    assert (said["loss_after"], said["loss_unrounded"]) == (
        report.loss_after,
        report.loss_unrounded,
    )
    assert (report.loss_unrounded is None) is (dtype == "float32")
    kept = torch.bfloat16 if dtype is None else torch.float32
    assert {tensor.dtype for tensor in stored(tmp_path / "h").values()} == {kept}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "h")
    assert model.dtype == kept
    after = independent_loss(model.float(), rows.held_out)
    assert report.loss_after == pytest.approx(after, rel=1e-6)
    card = (tmp_path / "h" / "README.md").read_text()
    assert ("held-out loss before rounding" in card) is (dtype is None)


def test_float32_can_be_asked_for_in_memory_too(tmp_path):
    model = slimmed(dtype=torch.bfloat16)
    report = llmslim.heal(model, data=text(), settings={"store_dtype": "float32", "epochs": 2})
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert report.loss_unrounded is None
    assert report.loss_after == pytest.approx(independent_loss(model, text().held_out), rel=1e-5)
