"""A teacher that was asked once teaches what one that is there would teach."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_checkpoint import tiny_tokenizer
from helpers_healing import LENGTH, Rows, Text, healed, losses, slimmed, text
from llmslim.healing.processes import processes
from llmslim.healing.stored import FILE
from safetensors import safe_open
from tiny import tiny_model

import llmslim
from llmslim.data import collate, collate_flat
from llmslim.errors import HealingError
from llmslim.healing import Place, heal_model, objective_named, storing
from llmslim.healing.objectives import Step, _chunks
from llmslim.recipe import Heal

HERE = Path(__file__).parent


class Patchy(Rows):
    """Rows of which some predict little and one nothing."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        labels = row["labels"].clone()
        labels[: {0: 0, 1: 5, 2: LENGTH}.get(index, 1)] = -100
        return {**row, "labels": labels}


def kept(folder, teacher, rows, *, together=collate, **options):
    folder.mkdir(exist_ok=True)
    settings = {
        "top_k": 8,
        "temperature": 1.0,
        "bf16": False,
        "micro_batch": 2,
        "position_ids": True,
        "state": processes(),
        "progress": lambda *_: None,
        **options,
    }
    return storing.store(folder, lambda: teacher, rows, together, **settings)


@pytest.mark.parametrize("together", [collate, collate_flat])
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 8), (2.0, 1), (1.0, 96), (1.0, 500)])
def test_the_loss_and_its_gradient_are_those_of_a_live_teacher(
    tmp_path, monkeypatch, together, temperature, top_k
):
    monkeypatch.setattr(_chunks, "CHUNK_NUMBERS", 96 * 5)
    monkeypatch.setattr(storing, "CHUNK_NUMBERS", 96 * 5)
    model, teacher, rows = slimmed(), tiny_model(seed=3), Patchy(5, 1)
    file = kept(
        tmp_path / "w", teacher, rows, together=together, top_k=top_k, temperature=temperature
    )
    spec = Heal(temperature=temperature, top_k=top_k, teacher_weight=0.7)
    loss = objective_named("logits").loss
    for which in ([3, 0, 1], [4, 2], [2]):
        batch = together([rows[index] for index in which])
        labels = batch.pop("labels")
        live = loss(Step(model, batch, labels, spec, teacher))
        ours = loss(Step(model, batch, labels, spec, None, (), file.of(which)))
        torch.testing.assert_close(ours, live, rtol=1e-6, atol=1e-6)
        parameters = list(model.parameters())
        for mine, theirs in zip(
            torch.autograd.grad(ours, parameters),
            torch.autograd.grad(live, parameters),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_in_bf16_the_loss_is_the_live_teachers_too(tmp_path):
    model, teacher, rows = slimmed(), tiny_model(seed=3, dtype=torch.bfloat16), Patchy(5, 1)
    file = kept(tmp_path / "w", teacher, rows, bf16=True)
    batch = collate([rows[index] for index in range(5)])
    labels = batch.pop("labels")
    loss = objective_named("logits").loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live = loss(Step(model, batch, labels, Heal(top_k=8), teacher))
        ours = loss(Step(model, batch, labels, Heal(top_k=8), None, (), file.of(range(5))))
    torch.testing.assert_close(ours, live, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("bf16", "per_token"), [(False, 8 * 8 + 4), (True, 8 * 6 + 4)])
def test_the_file_is_as_large_as_promised(tmp_path, bf16, per_token):
    file = kept(tmp_path / "w", tiny_model(), Rows(6, 1), bf16=bf16).file
    with safe_open(file, framework="pt") as opened:
        places = 6 * (LENGTH - 2)
        assert opened.get_tensor("logits").shape == (places, 8)
        assert opened.get_tensor("logits").dtype == (torch.bfloat16 if bf16 else torch.float32)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == header + 7 * 8 + places * per_token
    assert [path.name for path in (tmp_path / "w").iterdir()] == [FILE]


def test_a_healing_gives_the_losses_of_one_with_a_live_teacher(tmp_path):
    live = healed(slimmed(), tmp_path / "a", teacher=tiny_model(seed=3), top_k=8, epochs=2)
    teacher = tiny_model(seed=3)
    report = healed(
        slimmed(), tmp_path / "b", teacher=teacher, top_k=8, epochs=2, store_teacher=True
    )
    torch.testing.assert_close(losses(report), losses(live), rtol=1e-5, atol=0)
    assert report.loss_teacher == live.loss_teacher
    assert report.loss_after == pytest.approx(live.loss_after, rel=1e-5)
    assert report.objective == "logits"
    # A teacher in memory is its owner's; it is as it was.
    assert all(map(torch.equal, teacher.parameters(), tiny_model(seed=3).parameters()))


def test_a_teacher_that_was_loaded_for_it_leaves_memory_before_training(tmp_path, monkeypatch):
    sizes = []
    teacher = tiny_model(seed=3)
    loss = objective_named("logits").loss

    def watched(step):
        sizes.append((step.teacher, sum(p.numel() for p in teacher.parameters())))
        return loss(step)

    monkeypatch.setattr("llmslim.healing.objectives.logits.loss", watched)
    healed(slimmed(), tmp_path / "w", teacher=teacher, store_teacher=True)
    assert {empty for _, empty in sizes} == {sum(p.numel() for p in tiny_model().parameters())}
    sizes.clear()
    spec = Heal(teacher="by-name", store_teacher=True, batch_size=4)
    heal_model(slimmed(), text(), spec, place=Place(tmp_path / "n"), teacher=teacher)
    assert sizes
    assert set(sizes) == {(None, 0)}


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from helpers_healing import healed, slimmed
from llmslim.healing import storing
from tiny import tiny_model
storing.SAVE_SECONDS = 0

def progress(done, total, what):
    if (done, what) == (8, "storing the teacher's logits"):
        os.kill(os.getpid(), signal.SIGKILL)

healed(slimmed(), Path({folder!r}), teacher=tiny_model(seed=3), progress=progress, **{options!r})
"""


def test_after_sigkill_it_goes_on_with_the_rows_that_are_missing(tmp_path, monkeypatch):
    options = {"store_teacher": True, "top_k": 8}
    code = KILLED.format(here=str(HERE), folder=str(tmp_path / "w"), options=options)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "w" / FILE).exists()
    asked = []
    teacher = tiny_model(seed=3)
    teacher.register_forward_hook(lambda m, i, out: asked.append(out.logits.shape[0]))
    told = []
    report = healed(
        slimmed(),
        tmp_path / "w",
        teacher=teacher,
        resume=True,
        progress=lambda *what: told.append(what),
        **options,
    )
    # Half of the 16 rows, and the 4 held out.
    assert sum(asked) == 8 + 4
    assert told[:2] == [(at, 16, "storing the teacher's logits") for at in (8, 12)]
    whole = healed(slimmed(), tmp_path / "a", teacher=tiny_model(seed=3), **options)
    assert (tmp_path / "w" / FILE).read_bytes() == (tmp_path / "a" / FILE).read_bytes()
    assert losses(report) == losses(whole)
    # A whole file asks nobody.
    asked.clear()
    (tmp_path / "w" / "checkpoint-4" / "trainer_state.json").unlink()
    again = healed(slimmed(), tmp_path / "w", teacher=teacher, resume=True, **options)
    assert asked == []
    assert losses(again) == losses(whole)
    assert again.loss_teacher == whole.loss_teacher


def test_a_file_that_was_removed_is_computed_anew(tmp_path):
    file = kept(tmp_path / "w", tiny_model(), Rows(6, 1)).file
    before = file.read_bytes()
    file.unlink()
    (tmp_path / "w" / f".{FILE}.0").write_text("6")  # killed right before it was cleared away
    assert kept(tmp_path / "w", tiny_model(), Rows(6, 1)).file.read_bytes() == before


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    options = {"store_teacher": True, "top_k": 8, "micro_batch": 2}
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from helpers_healing import healed, slimmed
from tiny import tiny_model
healed(slimmed(), Path({str(tmp_path / "two")!r}), teacher=tiny_model(seed=3), **{options!r})
"""
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    run = subprocess.run(
        [*launch, "--main_process_port", "0", str(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    report = healed(slimmed(), tmp_path / "one", teacher=tiny_model(seed=3), **options)
    assert (tmp_path / "two" / FILE).read_bytes() == (tmp_path / "one" / FILE).read_bytes()
    lines = map(json.loads, (tmp_path / "two" / "history.jsonl").read_text().splitlines())
    both = [line["loss"] for line in lines if "loss" in line]
    torch.testing.assert_close(both, losses(report), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fallocate", [True, False])
def test_a_full_disk_is_told_before_any_work(tmp_path, monkeypatch, fallocate):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fallocate:
        monkeypatch.setattr(os, "posix_fallocate", full)
    else:
        monkeypatch.delattr(os, "posix_fallocate")
        monkeypatch.setattr(storing.shutil, "disk_usage", lambda _: type("U", (), {"free": 999}))
    teacher = tiny_model()
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher was asked"))
    with pytest.raises(
        HealingError, match=r"w: no space left .* \(516 bytes for each of 224 tokens\)"
    ):
        healed(slimmed(), tmp_path / "w", teacher=teacher, store_teacher=True)
    assert not (tmp_path / "w").exists()


def test_systems_that_cannot_take_space_early_write_the_same_file(tmp_path, monkeypatch):
    def cannot(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    one = kept(tmp_path / "a", tiny_model(), Rows(6, 1)).file.read_bytes()
    monkeypatch.setattr(os, "posix_fallocate", cannot)
    assert kept(tmp_path / "b", tiny_model(), Rows(6, 1)).file.read_bytes() == one


def test_a_file_that_was_cut_short_is_told(tmp_path):
    file = kept(tmp_path / "w", tiny_model(), Rows(6, 1)).file
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(HealingError, match=r"cannot be read .* Remove it and"):
        kept(tmp_path / "w", tiny_model(), Rows(6, 1))


def test_rows_that_changed_are_told(tmp_path):
    model, file = slimmed(), kept(tmp_path / "w", tiny_model(), Patchy(5, 1))
    batch = collate([Rows(5, 1)[index] for index in range(2)])
    step = Step(model, batch, batch.pop("labels"), Heal(), None, (), file.of([0, 1]))
    with pytest.raises(HealingError, match="stored for rows that predict 28; the text has changed"):
        objective_named("logits").loss(step)


def test_only_logits_are_stored(tmp_path):
    cases = [
        ({}, "no teacher to store"),
        ({"teacher": tiny_model(), "layers_share": 0.5}, "true with layers, logits; only"),
        ({"teacher": tiny_model(), "objective": "cross_entropy"}, "true with cross_entropy"),
    ]
    for options, said in cases:
        with pytest.raises(HealingError, match=said):
            healed(slimmed(), tmp_path / "w", store_teacher=True, **options)


def test_without_held_out_text_it_works_too(tmp_path):
    rows = Text(Rows(8, 1), Rows(0, 2))
    report = healed(slimmed(), tmp_path / "w", rows, teacher=tiny_model(), store_teacher=True)
    assert report.loss_teacher is None
    assert len(losses(report)) == 2


def test_from_folder_to_folder_with_both_the_teacher_and_the_blend_leave_no_trace(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    llmslim.save(tiny_model(), tmp_path / "dense", tokenizer=tiny_tokenizer())
    recipe = {
        "name": "short",
        "depth": {"keep_layers": [0, 1, 3]},
        "replace": [{"match": "*.mlp.*", "structure": "low_rank", "rank": 8}],
    }
    llmslim.convert(tmp_path / "dense", recipe, tmp_path / "slim")
    rows = [{"instruction": f"{n} {n}", "response": f"{n + 1}" * 3} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"train": "all", "template": "report", "held_out": 2}
    settings |= {"context_length": 48, "batch_size": 2}
    settings |= {"top_k": 64, "learning_rate": 1e-2}
    live, once = (
        llmslim.heal(
            tmp_path / "slim",
            tmp_path / f"healed-{keep}",
            data=str(tmp_path / "rows.jsonl"),
            teacher=tmp_path / "dense",
            epochs=2,
            settings={**settings, "store_teacher": keep},
        )
        for keep in (False, True)
    )
    torch.testing.assert_close(losses(once), losses(live), rtol=1e-5, atol=0)
    assert once.loss_after < once.loss_before
    assert llmslim.verify(once.path).ok
    names = [
        sorted(safe_open(folder / "model.safetensors", framework="pt").keys())
        for folder in (tmp_path / "slim", once.path)
    ]
    assert names[0] == names[1]
    assert not list(tmp_path.glob("*.healing"))
    again = llmslim.load(once.path)
    assert not any(module._forward_hooks for module in again.modules())
