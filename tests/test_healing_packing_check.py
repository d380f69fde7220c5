"""Samples packed into one row: no architecture lets one see another while it is healed."""

from __future__ import annotations

import pytest
import torch
from helpers_checkpoint import tiny_tokenizer
from helpers_healing import LENGTH, losses, slimmed, text
from tiny import tiny_model
from torch.nn.functional import cross_entropy

import llmslim
from llmslim.healing.inputs import load_inputs
from llmslim.healing.packing_check import sees_neighbours, takes_position_ids
from llmslim.options import HealOptions
from llmslim.progress import quietly

SAID = "Samples in one row would see each other"


@pytest.mark.parametrize(
    ("architecture", "mixes"),
    [("llama", False), ("mistral", False), ("gpt2", False), ("bloom", True), ("falcon", True)],
)
def test_a_model_is_asked_and_left_as_it_is(architecture, mixes):
    model = tiny_model(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert sees_neighbours(model) is mixes
    assert not model.training
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_position_ids_alone_say_nothing():
    assert takes_position_ids(tiny_model("falcon"))
    assert not takes_position_ids(tiny_model("bloom"))


def test_what_cannot_be_asked_counts_as_a_model_that_mixes(monkeypatch):
    model = tiny_model()

    def fails(*_args, **_options):
        raise ValueError("no forward pass outside a full moon")

    monkeypatch.setattr(model, "forward", fails)
    assert sees_neighbours(model)
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("architecture", ["bloom", "falcon"])
def test_the_loss_is_that_of_each_sample_alone(architecture):
    model, rows = slimmed(architecture), text()
    total = 0.0
    samples = torch.stack([row["input_ids"] for row in rows.held_out]).view(-1, LENGTH // 2)
    with torch.no_grad():
        for ids in samples:
            logits = model(ids[None], use_cache=False).logits[0, :-1]
            total += float(cross_entropy(logits, ids[1:], reduction="sum"))
    report = llmslim.heal(model, data=rows, epochs=1, settings={"batch_size": 4, "micro_batch": 4})
    expected = total / (len(samples) * (LENGTH // 2 - 1))
    assert report.loss_before == pytest.approx(expected, abs=1e-5)
    assert any(SAID in note for note in report.notes)
    assert report.settings["micro_batch"] == 1
    assert report.loss_after < report.loss_before


def test_a_stored_teacher_says_what_a_live_one_does():
    def heal(**settings):
        return llmslim.heal(
            slimmed("falcon"),
            data=text(),
            teacher=tiny_model("falcon", seed=3),
            epochs=1,
            settings={"batch_size": 4, "top_k": 8, **settings},
        )

    assert losses(heal(store_teacher=True)) == pytest.approx(losses(heal()), rel=1e-5)


def test_a_model_that_keeps_samples_apart_has_full_rows(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = [f"{n} {n + 1} {n + 2}. " * (1 + n % 7) for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))

    def rows(architecture):
        options = HealOptions(
            data=tmp_path / "rows.jsonl", context_length=48, tokenizer=tiny_tokenizer()
        )
        inputs = load_inputs(tiny_model(architecture), options, quietly)
        assert inputs.mixes is (architecture == "falcon")
        return inputs.text.train

    full, even = rows("llama"), rows("falcon")
    assert full.tokens == even.tokens
    assert full.padding < even.padding
    for row in even:
        begins = (row["position_ids"] == 0).nonzero().flatten().tolist()
        lengths = [b - a for a, b in zip(begins, [*begins[1:], 48], strict=True)]
        learned = [
            length
            for begin, length in zip(begins, lengths, strict=True)
            if (row["labels"][begin : begin + length] != -100).any()
        ]
        assert len(learned) * max(learned) <= 48
