"""A conversion that is cut short goes on to the same bytes, or says why not."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers_checkpoint import hashes, names
from helpers_resume import OPTIONS, Cut, begun, convert, cut_after
from helpers_resume import model as model
from helpers_resume import original as original
from helpers_resume import recipe as recipe
from helpers_resume import whole as whole
from helpers_streaming import RECIPES
from safetensors.torch import load_file, save_file

from llmslim import api
from llmslim.cli.main import cli
from llmslim.conversion import conversion_dir, streamed
from llmslim.conversion.conversion_dir import ConversionDir
from llmslim.errors import CheckpointError


@pytest.mark.parametrize("pieces", range(7))
def test_resumed_ends_in_the_same_bytes(
    pieces: int,
    model: Path,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    begun(monkeypatch, model, out, pieces)
    read: list[Path] = []
    real = streamed.Pieces.load
    monkeypatch.setattr(
        streamed.Pieces,
        "load",
        lambda self, piece: (read.append(self.source.path), real(self, piece)),
    )
    convert(model, out, resume=True)
    assert hashes(out) == whole
    assert read.count(model) == 7 - pieces  # the others are of the result, read back
    assert names(tmp_path) == ["m", "out"]


@pytest.mark.parametrize(
    "step",
    ["write_companions", "write_manifest", "flush_all", "check_loads", "check_computes"],
)
def test_cut_short_after_the_last_piece(
    step: str,
    model: Path,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"

    def cut(*args: Any, **options: Any) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(streamed, step, cut)
        with pytest.raises(Cut):
            convert(model, out)
    assert not out.exists()
    convert(model, out, resume=True)
    assert hashes(out) == whole


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_cut_short_around_the_rename(
    moment: str,
    model: Path,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(model, out)
    old = hashes(out)
    real = Path.rename

    def rename(path: Path, target: Path) -> Any:
        if (moment, path.name) in {("before", "out"), ("between", "checkpoint")}:
            os.kill(os.getpid(), signal.SIGKILL)
        made = real(path, target)
        if (moment, path.name) == ("after", "checkpoint"):
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Path, "rename", rename)
        try:
            convert(model, out, overwrite=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if moment == "between":
        assert not out.exists()
    else:
        assert hashes(out) == (old if moment == "before" else whole)
    if moment == "after":  # done, but not what is asked for now
        with pytest.raises(CheckpointError, match=rf"^{out}: .*--overwrite"):
            convert(model, out, resume=True, seed=5)
    done = convert(model, out, resume=True, overwrite=moment != "after")
    assert hashes(out) == whole
    assert done.report.totals.params_after == 64944
    assert names(tmp_path) == ["m", "out"]


def test_without_resume_it_says_how_to_go_on(
    model: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    work = begun(monkeypatch, model, out)
    with pytest.raises(CheckpointError, match=rf"^{work}: .*--resume.*--overwrite"):
        convert(model, out)
    assert work.exists()
    convert(model, out, overwrite=True)
    assert hashes(out) == whole
    assert not work.exists()


def changed(model: Path) -> dict[str, Any]:
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    return {}


CHANGES = {
    r"model\.safetensors": changed,
    "--seed .*0 .*1": lambda model: {"seed": 1},
    "--dtype .*None .*bfloat16": lambda model: {"dtype": "bfloat16"},
    "--init .*project .*random": lambda model: {"init": "random"},
    "--max-shard-size .*30000 .*40000": lambda model: {"max_shard_size": "40KB"},
    "recipe": lambda model: {"recipe": RECIPES["project"]},
    rf"torch .*{re.escape(torch.__version__)} .*0\.0": lambda model: {"torch": True},
}


@pytest.mark.parametrize("said", CHANGES)
def test_what_has_changed_is_named_and_the_work_is_kept(
    said: str,
    model: Path,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    work = begun(monkeypatch, model, out)
    before = hashes(work)
    changes = CHANGES[said](model)
    recipe = changes.pop("recipe", RECIPES["random"])
    if changes.pop("torch", False):
        now = SimpleNamespace(__name__="torch", __version__="0.0")
        monkeypatch.setattr(conversion_dir, "torch", now)
    with pytest.raises(CheckpointError, match=rf"^{work}: .*; .*{said}"):
        api.convert(model, recipe, out, resume=True, **{**OPTIONS, **changes})
    assert hashes(work) == before


def test_weights_that_changed_under_the_same_time_are_found(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(monkeypatch, model, tmp_path / "out")
    weights = model / "model.safetensors"
    data, about = bytearray(weights.read_bytes()), weights.stat()
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))
    with pytest.raises(CheckpointError, match=r"; .*model\.safetensors"):
        convert(model, tmp_path / "out", resume=True)


def test_resume_with_nothing_begun_begins(
    model: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    assert hashes(convert(model, tmp_path / "out", resume=True).path) == whole


def test_ctrl_c_says_what_is_kept(
    recipe: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["convert", str(model), "-r", str(recipe), "-o", str(out)]
    with monkeypatch.context() as patch:
        cut_after(patch, 2, KeyboardInterrupt())
        ran = CliRunner().invoke(cli, words)
    assert ran.exit_code == 130
    assert "what is done is kept in" in ran.stderr
    assert "--resume" in ran.stderr
    assert CliRunner().invoke(cli, [*words, "--resume"]).exit_code == 0
    assert names(tmp_path) == ["m", "out", "r.json"]


CHILD = """
import sys, torch
torch.set_num_threads(1)
from llmslim import api
print("ready", flush=True)
sys.stdin.readline()
options = dict(pair.split("=") for pair in sys.argv[4:])
api.convert(sys.argv[1], sys.argv[2], sys.argv[3], init="project", max_shard_size="30KB",
            resume="resume" in options)
print("done", flush=True)
"""


def kill_at_random(model: Path, out: Path, recipe: Path, longest: float, seed: int) -> bool:
    """Kill a converting process after a while; return whether it had finished."""
    moment = random.Random(seed).uniform(0, longest)
    command = [sys.executable, "-c", CHILD, str(model), str(recipe), str(out), "resume=1"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        child.stdin.write(b"\n")
        child.stdin.flush()
        timer = threading.Timer(moment, child.kill)
        timer.start()
        said = child.stdout.read()
        timer.cancel()
        child.wait()
    return said == b"done\n"


def killed_again_and_again(
    recipe: Path, model: Path, tmp_path: Path, whole: dict[str, str], times: int
) -> None:
    out = tmp_path / "out"
    start = time.perf_counter()
    assert hashes(convert(model, out).path) == whole
    longest = 1.5 * (time.perf_counter() - start)  # the first in a process takes a little longer
    shutil.rmtree(out)
    for seed in range(times):
        finished = kill_at_random(model, out, recipe, longest, seed)
        if out.exists():  # never half of it
            assert hashes(out) == whole
        assert finished <= out.exists()
        if seed % 3 == 2 or finished:
            convert(model, out, resume=True, overwrite=True)
            assert hashes(out) == whole
            assert not ConversionDir(out).exists
            shutil.rmtree(out)


def test_killed_at_random_moments(
    recipe: Path, model: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    killed_again_and_again(recipe, model, tmp_path, whole, 1)


@pytest.mark.slow
def test_killed_at_thirty_random_moments(
    recipe: Path, model: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    killed_again_and_again(recipe, model, tmp_path, whole, 30)
