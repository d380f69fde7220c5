"""A healing that is killed goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import errno
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers_healing import healed, losses, slimmed, text
from safetensors.torch import load_file
from tiny import tiny_model

from llmslim.errors import HealingError
from llmslim.healing import HealingDir, trainer
from llmslim.healing.distributed import processes

HERE = Path(__file__).parent
OPTIONS = {"epochs": 3, "micro_batch": 2, "evaluate_every": 3}

KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from helpers_healing import healed, slimmed
from tiny import tiny_model

def progress(done, total, what):
    if done == {step}:
        os.kill(os.getpid(), signal.SIGKILL)

healed(slimmed(), __import__("pathlib").Path({folder!r}), teacher=tiny_model(seed=3),
       progress=progress, **{options!r})
"""

GOES_ON = """
import sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from helpers_healing import healed, slimmed
from tiny import tiny_model

healed(slimmed(), Path({folder!r}), teacher=tiny_model(seed=3), resume=True, **{options!r})
"""


def heal(folder, **options):
    model = slimmed()
    report = healed(model, folder, teacher=tiny_model(seed=3), **{**OPTIONS, **options})
    return model, report


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return heal(tmp_path_factory.mktemp("whole") / "w")


def numbers(report):
    """Return a history without what depends on the clock."""
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in report.history]


@pytest.mark.parametrize("step", [8, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 6))])
def test_after_sigkill_all_losses_are_those_of_an_uninterrupted_run(tmp_path, uninterrupted, step):
    code = KILLED.format(here=str(HERE), step=step, folder=str(tmp_path / "w"), options=OPTIONS)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL
    lines = [*map(json.loads, (tmp_path / "w" / "history.jsonl").read_text().splitlines())]
    assert max(line["step"] for line in lines) == step
    model, report = heal(tmp_path / "w", resume=True)
    whole_model, whole = uninterrupted
    assert numbers(report) == numbers(whole)
    assert len(losses(report)) == 12
    assert (report.loss_before, report.loss_after) == (whole.loss_before, whole.loss_after)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole_model.state_dict()[name]), name


@pytest.mark.slow
def test_kills_from_outside_at_random_moments_change_nothing(tmp_path, uninterrupted):
    """In the middle of a step, of a save or of a line: whenever it happens to hit."""
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    folder = tmp_path / "w"
    code = GOES_ON.format(here=str(HERE), folder=str(folder), options=OPTIONS)

    def lines():
        file = folder / "history.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    killed = 0
    for _ in range(5):
        run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
        enough = lines() + draw.randrange(1, 6)  # there are 12 steps and 4 measurements
        while run.poll() is None and lines() < enough:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.2))
        run.kill()
        _, said = run.communicate()
        assert run.returncode in (0, -signal.SIGKILL), said.decode()
        killed += run.returncode != 0
    model, report = heal(folder, resume=True)
    whole_model, whole = uninterrupted
    assert killed, f"seed {seed}"
    assert numbers(report) == numbers(whole), f"seed {seed}"
    assert report.loss_after == whole.loss_after
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole_model.state_dict()[name]), f"{name}, seed {seed}"


def test_a_checkpoint_cut_short_is_not_gone_on_from(tmp_path, uninterrupted):
    heal(tmp_path / "w")
    (tmp_path / "w" / "checkpoint-12" / "trainer_state.json").write_text('{"half')
    _, report = heal(tmp_path / "w", resume=True)
    assert numbers(report) == numbers(uninterrupted[1])


def test_a_finished_one_is_only_written_again(tmp_path, uninterrupted):
    heal(tmp_path / "w")
    reported = []
    model, report = heal(tmp_path / "w", resume=True, progress=lambda *what: reported.append(what))
    assert reported == []
    assert numbers(report) == numbers(uninterrupted[1])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, uninterrupted[0].state_dict()[name]), name


def test_resume_with_nothing_there_begins(tmp_path, uninterrupted):
    _, report = heal(tmp_path / "w", resume=True)
    assert numbers(report) == numbers(uninterrupted[1])


def test_lora_goes_on_too(tmp_path):
    _, whole = heal(tmp_path / "a", train="lora")
    heal(tmp_path / "b", train="lora")
    (tmp_path / "b" / "checkpoint-12" / "trainer_state.json").unlink()
    _, report = heal(tmp_path / "b", train="lora", resume=True)
    assert numbers(report) == numbers(whole)


def test_an_unfinished_one_is_not_thrown_away_unasked(tmp_path):
    heal(tmp_path / "w")
    with pytest.raises(HealingError, match=rf"^{tmp_path / 'w'}: .*--resume.*--overwrite"):
        heal(tmp_path / "w")


def test_going_on_needs_the_same_settings(tmp_path):
    heal(tmp_path / "w")
    with pytest.raises(HealingError, match=r"learning_rate .*0\.01 .*0\.02; seed .*42 .*1\."):
        heal(tmp_path / "w", resume=True, learning_rate=2e-2, seed=1)
    with pytest.raises(HealingError, match=r"rows .*\[16, 4\] .*\[12, 4\]"):
        heal(tmp_path / "w", resume=True, rows=text(train=12))


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.tex").write_text("words")
    for options in ({}, {"resume": True}):
        with pytest.raises(HealingError, match=rf"^{tmp_path / 'w'}: "):
            heal(tmp_path / "w", **options)
        assert (tmp_path / "w" / "thesis.tex").read_text() == "words"


def test_checkpoints_hold_what_is_trained_and_two_are_kept(tmp_path):
    model, _ = heal(tmp_path / "w", train="blocks", evaluate_every=2)
    kept = sorted((tmp_path / "w").glob("checkpoint-*"))
    assert len(kept) == 2
    blocks = {name for name, _ in model.named_parameters() if ".mlp." in name}
    assert set(load_file(kept[0] / "trained.safetensors")) == blocks


@pytest.mark.parametrize(
    "broken", ["", "{", '{"format": 1}', '{"format": 3, "settings": {}}', "[]"]
)
def test_a_broken_run_file_is_reported(tmp_path, broken):
    (tmp_path / "run.json").write_text(broken)
    run = HealingDir(tmp_path, resume=True)
    with pytest.raises(HealingError), run, run.opened({"a": 1}, processes()):
        pass
    assert (tmp_path / "run.json").read_text() == broken


def test_half_a_line_at_the_end_of_the_history_is_forgotten(tmp_path):
    run = HealingDir(tmp_path)
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    run.rewind(2, write=True)
    assert run.history == [{"step": 1}, {"step": 2}]
    assert (tmp_path / "history.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed writing file data.pkl: file write failed"),
    ],
    ids=["system", "safetensors", "torch"],
)
def test_a_full_disk_is_a_healing_error(tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(trainer, "save_file", full)
    with pytest.raises(HealingError, match=rf"^{tmp_path / 'w'}: "):
        heal(tmp_path / "w")
    assert not (tmp_path / "w").exists()  # nothing was saved that one could go on with


@pytest.mark.slow
def test_a_full_disk_is_reported_and_the_last_state_kept(tmp_path):
    code = f"""
import resource, sys
sys.path.insert(0, {str(HERE)!r})
import torch
torch.set_num_threads(1)
from helpers_healing import healed, slimmed
from tiny import tiny_model
from pathlib import Path

def progress(done, total, what):
    if done == 4:  # no file may grow beyond this from now on: as if the disk were full
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

healed(slimmed(), Path({str(tmp_path / "w")!r}), teacher=tiny_model(seed=3),
       progress=progress, **{OPTIONS!r})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UnfinishedError" in run.stderr, run.stderr
    assert "no space left for the state of the training; the last whole one is kept" in run.stderr
    assert HealingDir(tmp_path / "w").last_checkpoint() == tmp_path / "w" / "checkpoint-3"
