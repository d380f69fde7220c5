"""Training in memory: what changes, what does not, and how it ends."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import every_architecture
import pytest
import torch
from helpers_healing import LENGTH, Rows, Text, healed, independent_loss, losses, slimmed, text
from tiny import logits, tiny_model, tokens
from torch import nn

from llmslim import slim
from llmslim.errors import HealingError
from llmslim.healing import inputs, objectives, plan
from llmslim.healing.report import should_stop
from llmslim.healing.trainable import make_trainable
from llmslim.recipe import Heal


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("train", ["all", "blocks", "lora"])
def test_the_held_out_loss_falls_and_is_what_it_says(tmp_path, train):
    model, rows = slimmed(), text()
    before = independent_loss(model, rows.held_out)
    report = healed(model, tmp_path / "w", rows, train=train, epochs=3)
    after = independent_loss(model, rows.held_out)
    assert report.loss_before == pytest.approx(before, rel=1e-5)
    assert report.loss_after == pytest.approx(after, rel=1e-4)
    assert after < before - 0.02
    assert (report.steps, report.tokens) == (12, 12 * 4 * LENGTH)
    assert len(losses(report)) == 12
    assert report.objective == "cross_entropy"
    assert not model.training


def test_distillation_brings_the_model_to_its_teacher(tmp_path):
    model, teacher = slimmed(), tiny_model()
    ids = text().train.ids
    before = (logits(model, ids) - logits(teacher, ids)).square().mean()
    rows = text(held_out=0)
    healed(model, tmp_path / "a", rows, teacher=teacher, epochs=16, learning_rate=3e-3)
    after = (logits(model, ids) - logits(teacher, ids)).square().mean()
    assert after < before / 2


def test_the_gap_is_to_the_teacher(tmp_path):
    teacher = tiny_model(seed=3)
    report = healed(slimmed(), tmp_path / "w", teacher=teacher, epochs=4)
    assert report.objective == "logits"
    assert report.loss_teacher == pytest.approx(
        independent_loss(teacher, text().held_out), rel=1e-5
    )
    known = {"loss_before": 3.0, "loss_after": 2.5, "loss_teacher": 2.0}
    assert replace(report, **known).gap_closed == 0.5
    for there_is_none in ({"loss_teacher": 3.0}, {"loss_teacher": 4.0}, {"loss_teacher": None}):
        assert replace(report, **{**known, **there_is_none}).gap_closed is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_leaves_every_other_tensor_as_it_was(tmp_path, dtype):
    model = slimmed(dtype=dtype)
    before = state(model)
    report = healed(model, tmp_path / "w", train="blocks")
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    blocks = {n for n in before if ".mlp." in n}
    assert changed == blocks
    assert all(tensor.dtype == before[name].dtype for name, tensor in model.state_dict().items())
    assert report.trained_parameters == sum(before[name].numel() for name in blocks)


def test_blocks_means_narrowed_mlps_too(tmp_path):
    model = tiny_model()
    slim(model, {"width": {"intermediate_size": 40}})
    before = state(model)
    names = [n for n, m in model.named_modules() if ".mlp." in n and isinstance(m, nn.Linear)]
    healed(model, tmp_path / "w", train="blocks", narrowed=names)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {f"{name}.weight" for name in names}


def test_blocks_needs_blocks(tmp_path):
    with pytest.raises(HealingError, match=r"^heal\.train: blocks, .*`all` .*`lora`"):
        healed(tiny_model(), tmp_path / "w", train="blocks")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_lora_is_multiplied_out(architecture):
    model = slimmed(architecture)
    kinds = {name: type(module) for name, module in model.named_modules()}
    before, ids = state(model), tokens()
    trainable = make_trainable(model, Heal(train="lora", lora_rank=2))
    assert len(trainable.lora) == (16 if architecture == "llama" else 8)
    torch.testing.assert_close(logits(model, ids), logits(slimmed(architecture), ids))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    beside = logits(model, ids)
    trainable.release()
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    torch.testing.assert_close(logits(model, ids), beside, rtol=1e-4, atol=1e-4)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {f"{name}.weight" for name in trainable.lora}
    assert not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_step_does_not_depend_on_how_it_is_split(tmp_path):
    rows = text()
    whole, parts = (
        healed(slimmed(), tmp_path / str(n), rows, micro_batch=n, epochs=2) for n in (4, 1)
    )
    torch.testing.assert_close(losses(whole), losses(parts), rtol=1e-4, atol=0)
    assert whole.loss_after == pytest.approx(parts.loss_after, rel=1e-4)


def test_gradient_checkpointing_changes_no_loss(tmp_path):
    teacher = tiny_model(seed=3)
    options = {"teacher": teacher, "epochs": 2}
    model = slimmed()
    kept = healed(slimmed(), tmp_path / "a", **options)
    again = healed(model, tmp_path / "b", gradient_checkpointing=True, **options)
    torch.testing.assert_close(losses(kept), losses(again), rtol=1e-4, atol=0)
    assert not model.model.layers[0].gradient_checkpointing


def test_blocks_have_a_learning_rate_of_their_own(tmp_path):
    model = slimmed()
    before = state(model)
    healed(model, tmp_path / "w", learning_rate=1e-30, block_learning_rate=1e-2)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {name for name in before if ".mlp." in name}


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("cosine", 0.5)])
def test_the_learning_rate_follows_the_schedule(tmp_path, schedule, last):
    report = healed(
        slimmed(), tmp_path / "w", schedule=schedule, warmup=0.25, epochs=2, learning_rate=1e-3
    )
    rates = [line["learning_rate"] / 1e-3 for line in report.history if "loss" in line]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    # A cosine from 1 at step 2 to 0 at step 8: step 5 is half of the way.
    assert rates[5] == pytest.approx(last)


@pytest.mark.parametrize("fast", [True, False])
def test_precision_is_bf16_by_default_where_that_is_fast(monkeypatch, fast):
    monkeypatch.setattr(plan, "bf16_is_fast", lambda _: fast)
    cpu = torch.device("cpu")
    used = [plan.uses_bf16(Heal(precision=name), cpu) for name in ("auto", "bf16", "fp32")]
    assert used == [fast, True, False]


def test_bf16_computes_in_bf16_over_float32_weights(tmp_path, monkeypatch):
    seen = set()
    model = slimmed(dtype=torch.bfloat16)

    def watch(module, inputs, output):
        seen.add((output.dtype, module.weight.dtype))

    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(watch)
    report = healed(model, tmp_path / "w", precision="bf16")
    handle.remove()
    assert seen == {(torch.bfloat16, torch.float32)}
    assert model.dtype == torch.bfloat16
    # What is reported is the loss of the weights as they are stored.
    assert report.loss_after == pytest.approx(
        independent_loss(model.float(), text().held_out), rel=0.02
    )


def poisoned(monkeypatch, value, at):
    """Let the loss, or only its gradient, be no number from a step on."""
    calls = []
    real = objectives.objective_named("cross_entropy")

    def loss(step):
        total = real.loss(step)
        if step.model.training:
            calls.append(1)
        if len(calls) < at:
            return total
        if value == "gradient":
            total.register_hook(lambda grad: grad * math.nan)
            return total
        return total * value

    monkeypatch.setattr(inputs, "objective_named", lambda name: real._replace(loss=loss))


@pytest.mark.parametrize(
    ("value", "said"),
    [(math.nan, "loss .*nan"), (math.inf, "loss .*inf"), ("gradient", "gradient .*nan")],
)
def test_a_loss_that_is_no_number_ends_it_and_keeps_the_last_good_state(
    tmp_path, monkeypatch, value, said
):
    poisoned(monkeypatch, value, at=6)
    model = slimmed()
    good = tmp_path / "w" / "checkpoint-4"
    with pytest.raises(HealingError, match=rf"^step 6: .*{said};.* {good}\."):
        healed(model, tmp_path / "w", epochs=2, evaluate_every=2)
    assert (good / "trainer_state.json").is_file()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    lines = [*map(json.loads, (tmp_path / "w" / "history.jsonl").read_text().splitlines())]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]


def test_it_stops_when_the_held_out_loss_rises_and_keeps_the_best(tmp_path):
    model = slimmed()
    rows = Text(Rows(64, 1, step=5), Rows(4, 2))  # counts otherwise than what is held out
    report = healed(model, tmp_path / "w", rows, epochs=4, evaluate_every=1, patience=2)
    measured = [line["held_out_loss"] for line in report.history if "held_out_loss" in line]
    best = measured.index(min(measured)) + 1
    assert len(measured) == best + 2 < 64
    assert report.steps == best
    assert any(f"Stopped early, after {best + 2} of 64" in note for note in report.notes)
    assert independent_loss(model, rows.held_out) == pytest.approx(min(measured), rel=1e-4)


def test_patience_null_never_stops(tmp_path):
    rows = Text(Rows(16, 1, step=5), Rows(4, 2))
    report = healed(slimmed(), tmp_path / "w", rows, epochs=2, evaluate_every=1, patience=None)
    assert len(losses(report)) == 8


@pytest.mark.parametrize(
    ("measured", "stops"),
    [
        ([3, 2], False),
        ([3, 2, 4], False),
        ([3, 2, 4, 1], False),
        ([3, 2, 1, 4], False),
        ([3, 2, 4, 2], True),
        ([3, 2, 4, 3], True),
    ],
)
def test_it_waits_as_long_as_its_patience(measured, stops):
    history = [{"step": step, "held_out_loss": loss} for step, loss in enumerate(measured)]
    assert should_stop(history, 2) is stops
    assert not should_stop(history, None)


def test_getting_worse_is_reported(tmp_path):
    rows = Text(Rows(4, 1, step=5), Rows(4, 2))
    report = healed(slimmed(), tmp_path / "w", rows, train="all", learning_rate=1.0, epochs=4)
    assert report.loss_after > report.loss_before
    assert any("did not lower the held-out loss" in note for note in report.notes)


def test_without_held_out_text_nothing_is_claimed(tmp_path):
    report = healed(slimmed(), tmp_path / "w", text(held_out=0))
    assert (report.loss_before, report.loss_after, report.gap_closed) == (None, None, None)
    assert any("was not measured" in note for note in report.notes)
    assert report.steps == 4


def test_tokens_count_steps_rounded_up(tmp_path):
    report = healed(slimmed(), tmp_path / "w", tokens=LENGTH * 4 * 2 + 1, epochs=9)
    assert (report.steps, report.tokens) == (3, 3 * 4 * LENGTH)


def test_what_cannot_be_healed_is_reported(tmp_path):
    model = slimmed()
    cases = [
        ({"rows": text(train=0)}, r"^heal\.data: "),
        ({"objective": "logits"}, r"^heal\.objective: logits .*--teacher"),
        ({"objective": "hopes"}, r"^heal\.objective: 'hopes'; .* cross_entropy, logits"),
        ({"teacher": tiny_model(vocab_size=64)}, r"^heal\.teacher: .* 64 .* 96;"),
    ]
    before = state(model)
    for options, said in cases:
        with pytest.raises(HealingError, match=said):
            healed(model, tmp_path / "w", **options)
    assert not (tmp_path / "w").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_progress_tells_loss_and_speed(tmp_path):
    reported = []
    healed(slimmed(), tmp_path / "w", progress=lambda *what: reported.append(what))
    assert [(done, total) for done, total, _ in reported] == [(n, 4) for n in range(5)]
    assert reported[0][2] == "measuring the model before healing"
    assert "held-out" in reported[-1][2]
    assert "tokens/s" in reported[-1][2]


def test_layers_that_pass_no_gradient_on_are_reported(tmp_path):
    from transformers import ReformerConfig, ReformerModelWithLMHead

    config = ReformerConfig(
        vocab_size=100, hidden_size=32, feed_forward_size=64, num_attention_heads=2,
        attention_head_size=16, num_hidden_layers=2, attn_layers=["local", "local"],
        local_attn_chunk_length=4, axial_pos_embds=False, is_decoder=True,
        max_position_embeddings=64,
    )  # fmt: skip
    model = ReformerModelWithLMHead(config)
    before = state(model)
    with pytest.raises(HealingError, match=r"^heal\.train: lora, .*ReformerModelWithLMHead"):
        healed(model, tmp_path / "w", train="lora")
    assert {name: float((t - before[name]).abs().max()) for name, t in state(model).items()} == (
        dict.fromkeys(before, 0.0)
    )
    healed(model, tmp_path / "w", train="all")
    assert not torch.equal(state(model)["lm_head.decoder.weight"], before["lm_head.decoder.weight"])


def test_lora_needs_decoder_layers(tmp_path):
    model = every_architecture.tiny_model(every_architecture.config_classes()["hrm_text"])
    with pytest.raises(HealingError, match=r"^heal\.train: lora, .*HrmTextForCausalLM"):
        healed(model, tmp_path / "w", train="lora")
