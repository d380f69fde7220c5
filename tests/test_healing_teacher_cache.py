"""A teacher that was asked once teaches what one that is there would teach."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_checkpoint import stored, tiny_tokenizer
from helpers_healing import LENGTH, Rows, Text, healed, losses, slimmed, text
from safetensors import SafetensorError, safe_open
from tiny import tiny_model

import llmslim
from llmslim.anatomy import predictions
from llmslim.data import collate, collate_flat
from llmslim.errors import HealingError, UnfinishedError
from llmslim.healing import HealingDir, HealInputs, heal_model, objective_named, teacher_cache
from llmslim.healing.distributed import processes
from llmslim.healing.objectives import Step, logits
from llmslim.healing.teacher_cache import TeacherCache
from llmslim.progress import quietly
from llmslim.recipe import Heal

HERE = Path(__file__).parent


class Patchy(Rows):
    """Rows of which some predict little and one nothing."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        labels = row["labels"].clone()
        labels[: {0: 0, 1: 5, 2: LENGTH}.get(index, 1)] = -100
        return {**row, "labels": labels}


@pytest.fixture(autouse=True)
def _small_files(monkeypatch):
    monkeypatch.setattr(teacher_cache, "SHARD_ROWS", 4)


def filled(folder, teacher, rows, *, together=collate, key="k", **options):
    cache = TeacherCache(folder, key, **{"top_k": 8, "temperature": 1.0, "bf16": False, **options})
    cache.fill(
        lambda: teacher,
        rows,
        together,
        micro_batch=3,
        state=processes(),
        progress=quietly,
    )
    return cache


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("together", [collate, collate_flat])
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 8), (2.0, 1), (1.0, 96), (1.0, 500)])
def test_the_loss_and_its_gradient_are_those_of_a_live_teacher(
    tmp_path, monkeypatch, together, temperature, top_k
):
    monkeypatch.setattr(predictions, "CPU_CHUNK", 96 * 5)
    model, teacher, rows = slimmed(), tiny_model(seed=3), Patchy(5, 1)
    cache = filled(
        tmp_path / "w", teacher, rows, together=together, top_k=top_k, temperature=temperature
    )
    spec = Heal(temperature=temperature, top_k=top_k, teacher_weight=0.7)
    loss = objective_named("logits").loss
    for which in ([3, 0, 1], [4, 2], [2]):
        batch = together([rows[index] for index in which])
        labels = batch.pop("labels")
        live = loss(Step(model, batch, labels, spec, teacher))
        ours = loss(Step(model, batch, labels, spec, None, cache.topk_of(which)))
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
    cache = filled(tmp_path / "w", teacher, rows, bf16=True)
    batch = collate([rows[index] for index in range(5)])
    labels = batch.pop("labels")
    loss = objective_named("logits").loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live = loss(Step(model, batch, labels, Heal(top_k=8), teacher))
        ours = loss(Step(model, batch, labels, Heal(top_k=8), None, cache.topk_of(range(5))))
    torch.testing.assert_close(ours, live, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("bf16", "per_token"), [(False, 8 * 8 + 4), (True, 8 * 6 + 4)])
def test_the_files_are_as_large_as_promised(tmp_path, bf16, per_token):
    filled(tmp_path / "w", tiny_model(), Rows(6, 1), bf16=bf16)
    assert sorted(files(tmp_path / "w")) == ["00000.safetensors", "00001.safetensors"]
    for name, rows in (("00000.safetensors", 4), ("00001.safetensors", 2)):
        file, places = tmp_path / "w" / name, rows * (LENGTH - 2)
        with safe_open(file, framework="pt") as opened:
            assert opened.get_tensor("logits").shape == (places, 8)
            assert opened.get_tensor("logits").dtype == (torch.bfloat16 if bf16 else torch.float32)
            assert opened.metadata() == {"key": "k"}
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert file.stat().st_size == header + (rows + 1) * 8 + places * per_token


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

    monkeypatch.setattr(logits, "loss", watched)
    healed(slimmed(), tmp_path / "w", teacher=teacher, store_teacher=True)
    assert {empty for _, empty in sizes} == {sum(p.numel() for p in tiny_model().parameters())}
    sizes.clear()
    spec = Heal(teacher="by-name", store_teacher=True, batch_size=4)
    heal_model(HealInputs(slimmed(), spec, text(), teacher=teacher), HealingDir(tmp_path / "n"))
    assert sizes
    assert set(sizes) == {(None, 0)}


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from helpers_healing import healed, slimmed
from llmslim.healing import teacher_cache
from tiny import tiny_model
teacher_cache.SHARD_ROWS = 4

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
    assert sorted(files(tmp_path / "w" / "teacher")) == ["00000.safetensors", "00001.safetensors"]
    asked = []
    teacher = tiny_model(seed=3)
    teacher.register_forward_hook(lambda m, i, out: asked.append(out.logits.shape[0]))
    reported = []
    report = healed(
        slimmed(),
        tmp_path / "w",
        teacher=teacher,
        resume=True,
        progress=lambda *what: reported.append(what),
        **options,
    )
    # Half of the 16 rows, and the 4 held out.
    assert sum(asked) == 8 + 4
    assert reported[:2] == [(at, 16, "storing the teacher's logits") for at in (8, 12)]
    whole = healed(slimmed(), tmp_path / "a", teacher=tiny_model(seed=3), **options)
    assert files(tmp_path / "w" / "teacher") == files(tmp_path / "a" / "teacher")
    assert losses(report) == losses(whole)
    # With whole files the teacher is not needed.
    asked.clear()
    (tmp_path / "w" / "checkpoint-4" / "trainer_state.json").unlink()
    again = healed(slimmed(), tmp_path / "w", teacher=teacher, resume=True, **options)
    assert asked == []
    assert losses(again) == losses(whole)
    assert again.loss_teacher == whole.loss_teacher


@pytest.mark.parametrize("how", ["removed", "cut short", "of another key"])
def test_only_what_is_missing_is_computed(tmp_path, how):
    filled(tmp_path / "w", tiny_model(), Rows(6, 1))
    before, second = files(tmp_path / "w"), tmp_path / "w" / "00001.safetensors"
    if how == "removed":
        second.unlink()
    elif how == "cut short":
        second.write_bytes(second.read_bytes()[:-1])
    else:
        filled(tmp_path / "other", tiny_model(seed=3), Rows(6, 1), key="other")
        second.write_bytes((tmp_path / "other" / second.name).read_bytes())
    asked, teacher = [], tiny_model()
    teacher.register_forward_hook(lambda m, i, out: asked.append(out.logits.shape[0]))
    filled(tmp_path / "w", teacher, Rows(6, 1))
    assert sum(asked) == 2
    assert files(tmp_path / "w") == before


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
from llmslim.healing import teacher_cache
from tiny import tiny_model
teacher_cache.SHARD_ROWS = 4
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
    assert files(tmp_path / "two" / "teacher") == files(tmp_path / "one" / "teacher")
    lines = map(json.loads, (tmp_path / "two" / "history.jsonl").read_text().splitlines())
    both = [line["loss"] for line in lines if "loss" in line]
    torch.testing.assert_close(both, losses(report), rtol=1e-4, atol=1e-6)


def test_a_full_disk_is_an_error_before_any_work(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=516 * 224 - 1)
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: usage)
    teacher = tiny_model()
    teacher.register_forward_hook(lambda *_: pytest.fail("the teacher was asked"))
    with pytest.raises(HealingError, match=rf"^{tmp_path / 'w' / 'teacher'}: .*\(516 .* 224 .* 64"):
        healed(slimmed(), tmp_path / "w", teacher=teacher, store_teacher=True)
    assert not (tmp_path / "w").exists()


def test_a_disk_that_fills_up_keeps_what_is_whole(tmp_path, monkeypatch):
    written, save = [], teacher_cache.save_file

    def full(tensors, path, metadata):
        if written:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, path, metadata)
        written.append(path)

    options = {"store_teacher": True, "top_k": 8}
    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "save_file", full)
        with pytest.raises(UnfinishedError, match=rf"^{tmp_path / 'w'}: .*--resume"):
            healed(slimmed(), tmp_path / "w", teacher=tiny_model(seed=3), **options)
    assert list(files(tmp_path / "w" / "teacher")) == ["00000.safetensors"]
    again = healed(slimmed(), tmp_path / "w", teacher=tiny_model(seed=3), resume=True, **options)
    whole = healed(slimmed(), tmp_path / "a", teacher=tiny_model(seed=3), **options)
    assert losses(again) == losses(whole)


def test_rows_that_changed_are_reported(tmp_path):
    model, cache = slimmed(), filled(tmp_path / "w", tiny_model(), Patchy(5, 1))
    batch = collate([Rows(5, 1)[index] for index in range(2)])
    step = Step(model, batch, batch.pop("labels"), Heal(), None, cache.topk_of([0, 1]))
    with pytest.raises(HealingError, match=r"^heal\.store_teacher: 24 .* 28;"):
        objective_named("logits").loss(step)


def test_only_logits_are_stored(tmp_path):
    cases = [
        ({}, r"^heal\.store_teacher: true .*--teacher"),
        (
            {"teacher": tiny_model(), "objective": "cross_entropy"},
            r"^heal\.store_teacher: true .*cross_entropy.*`logits`",
        ),
    ]
    for options, said in cases:
        with pytest.raises(HealingError, match=said):
            healed(slimmed(), tmp_path / "w", store_teacher=True, **options)


def test_without_held_out_text_it_works_too(tmp_path):
    rows = Text(Rows(8, 1), Rows(0, 2))
    report = healed(slimmed(), tmp_path / "w", rows, teacher=tiny_model(), store_teacher=True)
    assert report.loss_teacher is None
    assert len(losses(report)) == 2


def test_from_folder_to_folder_it_leaves_no_trace(tmp_path, monkeypatch):
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
    assert once.loss_after == pytest.approx(live.loss_after, rel=1e-5)
    assert llmslim.verify(once.path).ok
    assert stored(tmp_path / "slim").keys() == stored(once.path).keys()
    assert not list(tmp_path.glob("*.healing"))
    again = llmslim.load(once.path)
    assert not any(module._forward_hooks for module in again.modules())
