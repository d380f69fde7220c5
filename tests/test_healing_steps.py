"""Which rows a healing sees, how often, at which rate, and how many tokens that were."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers_healing import healed, slimmed, text
from tiny import tiny_model
from torch.utils.data import Dataset

from llmslim.healing.plan import StepPlan, rate_share
from llmslim.healing.rows import tokens_in
from llmslim.healing.trainer import HealingTrainer
from llmslim.recipe import Heal


@pytest.fixture
def seen(monkeypatch):
    """Return rows by their first two tokens, a list for each step."""
    steps = []
    plain = HealingTrainer.get_batch_samples

    def spy(self, *args, **options):
        samples, count = plain(self, *args, **options)
        batches = [batch for batch in samples if (batch["labels"] != -100).any()]
        rows = [
            tuple(ids.tolist())
            for batch in batches
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
            if (labels != -100).any()
        ]
        steps.append(rows)
        return samples, count

    monkeypatch.setattr(HealingTrainer, "get_batch_samples", spy)
    return steps


@pytest.mark.parametrize(
    ("batch", "epochs", "sizes"),
    [
        (4, 3, [4, 4, 4, 2] * 3),
        (13, 3, [13, 1] * 3),
        (64, 2, [14] * 2),
        (4, 0.5, [4, 3]),
        (4, 1.25, [4, 4, 4, 2, 4]),
    ],
)
@pytest.mark.parametrize("micro", [1, 3])
def test_every_row_comes_as_often_as_there_are_passes(tmp_path, seen, batch, epochs, sizes, micro):
    batch = batch if micro == 1 else math.ceil(batch / 3) * 3
    rows = text(train=14, held_out=0)
    report = healed(
        slimmed(), tmp_path / "w", rows, batch_size=batch, micro_batch=micro, epochs=epochs
    )
    if micro == 1:
        assert [len(step) for step in seen] == sizes
    counts = Counter(row for step in seen for row in step)
    total = math.ceil(epochs * 14)
    assert sum(counts.values()) == total
    assert set(counts.values()) <= {math.floor(epochs), math.ceil(epochs)}
    assert report.steps == len(seen)
    assert report.tokens == total * rows.train.tokens // 14


def test_a_number_of_tokens_is_whole_steps_of_as_many_passes_as_it_takes(tmp_path, seen):
    report = healed(
        slimmed(), tmp_path / "w", text(train=14, held_out=0), tokens=16 * 30, batch_size=4
    )
    assert [len(step) for step in seen] == [4, 4, 4, 2, 4, 4, 4, 2, 4]
    assert report.tokens == 32 * 16


class Padded(Dataset):
    """Rows that end in padding: something like one more sample, without labels."""

    def __init__(self, rows, padding):
        self.rows, self.padding = rows, padding
        self.tokens = sum(self.real(index) for index in range(len(rows)))

    def real(self, index):
        return 16 - self.padding * (index % 3)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = {key: value.clone() for key, value in self.rows[index].items()}
        end = self.real(index)
        row["labels"][end:] = -100
        row["position_ids"][end:] = torch.arange(16 - end)
        return row


def test_tokens_are_counted_as_they_come_without_padding(tmp_path):
    rows = text(train=10, held_out=0)
    rows.train = Padded(rows.train, 3)
    assert [tokens_in(rows.train, n) for n in range(4)] == [16, 13, 10, 16]
    report = healed(slimmed(), tmp_path / "w", rows, batch_size=4, epochs=2, micro_batch=2)
    order = [torch.randperm(10, generator=torch.Generator().manual_seed(42 + n)) for n in (0, 1)]
    expected, total = [], 0
    for step in (rows for one in order for rows in one.split(4)):
        total += sum(rows.train.real(int(index)) for index in step)
        expected.append(total)
    assert [line["tokens"] for line in report.history if "loss" in line] == expected
    assert report.tokens == 2 * rows.train.tokens


def test_a_step_trains_something(tmp_path):
    model = slimmed()
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = healed(model, tmp_path / "w", text(train=3), train="all", warmup=0.03)
    assert report.steps == 1
    assert [line["learning_rate"] for line in report.history if "loss" in line] == [1e-2]
    assert not all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 3, 40])
def test_no_step_has_a_rate_of_0_and_one_has_the_peak(schedule, warmup, steps):
    spec = Heal(schedule=schedule, warmup=warmup)
    rates = [rate_share(step, spec, steps) for step in range(steps)]
    assert all(rate > 0 for rate in rates)
    peak = rates.index(max(rates))
    assert rates[peak] == 1
    assert peak == min(math.ceil(warmup * steps), steps - 1)
    assert rates[: peak + 1] == sorted(set(rates[: peak + 1]))
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_both_learning_rates_are_reported(tmp_path):
    report = healed(
        slimmed(), tmp_path / "w", learning_rate=1e-3, block_learning_rate=1e-2, schedule="constant"
    )
    reported = {
        (line["learning_rate"], line["block_learning_rate"])
        for line in report.history
        if "loss" in line
    }
    assert reported == {(1e-3, 1e-2)}


def test_what_is_planned_is_what_is_done(tmp_path):
    spec = Heal(epochs=1.5, batch_size=4)
    plan = StepPlan.of(spec, text(train=14), 1)
    assert (plan.steps, plan.rows, plan.tokens) == (6, 21, 21 * 16)
    plan = StepPlan.of(spec, text(train=14), 3)  # six rows a step
    assert (plan.steps, plan.rows) == (3 + 2, 21)


def test_matrices_alone_decay():
    """Truth: without a gradient, a step of AdamW is the decay alone."""
    model = tiny_model("gpt2", num_hidden_layers=1)
    spec = Heal(weight_decay=0.5, learning_rate=0.1, block_learning_rate=0.2)
    changed = {"transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.bias"}
    trainer = SimpleNamespace(optimizer=None, model=model, spec=spec)
    trainer.trainable = SimpleNamespace(changed=changed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = HealingTrainer.create_optimizer(trainer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = 0.2 if name in changed else 0.1
        kept = 1 - 0.5 * rate if parameter.ndim > 1 else 1
        torch.testing.assert_close(parameter.detach(), kept * before[name], rtol=1e-6, atol=0)
