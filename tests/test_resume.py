"""A conversion that is cut short goes on to the same bytes, or says why not."""

from __future__ import annotations

import errno
import json
import os
import random
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
from click.testing import CliRunner
from helpers_checkpoint import disk_order, hashes, names
from helpers_streaming import RECIPES, SMALL_SHARDS, in_memory, stored_model
from safetensors.torch import load_file, save_file

from llmslim import api
from llmslim.cli.main import cli
from llmslim.conversion import conversion_dir, streamed
from llmslim.conversion.conversion_dir import ConversionDir
from llmslim.conversion.finished import FinishedPieces
from llmslim.errors import CheckpointError, UnfinishedError
from llmslim.storage import safetensors_io

OPTIONS: dict[str, Any] = {"init": "project", **SMALL_SHARDS}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_model(tmp_path_factory.mktemp("original") / "m")


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy of the model: some tests change it."""
    return shutil.copytree(original, tmp_path / "m")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The recipe in a file, for the command line."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps(RECIPES["random"]))
    return path


@pytest.fixture(scope="module")
def whole(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an undisturbed conversion."""
    return hashes(convert(original, tmp_path_factory.mktemp("whole") / "undisturbed").path)


def convert(model: Path, out: Path, **options: Any) -> Any:
    return api.convert(model, RECIPES["random"], out, **{**OPTIONS, **options})


class Cut(BaseException):
    """A kill, as far as one process can do it to itself: nothing may tidy up after it."""


def cut_after(monkeypatch: pytest.MonkeyPatch, pieces: int, error: BaseException) -> None:
    """Fail while the piece after so many is handed over."""
    real, seen = FinishedPieces.put, 0

    def put(self: Any, *args: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > pieces:
            self.wait()
            raise error
        real(self, *args)

    monkeypatch.setattr(FinishedPieces, "put", put)


def begun(
    monkeypatch: pytest.MonkeyPatch, model: Path, out: Path, pieces: int = 3, **options: Any
) -> Path:
    """Leave an unfinished conversion; return its folder."""
    with monkeypatch.context() as patch:
        cut_after(patch, pieces, Cut())
        with pytest.raises(Cut):
            convert(model, out, **options)
    assert not out.exists() or options.get("overwrite")
    return ConversionDir(out).path


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
        with pytest.raises(CheckpointError, match="exists already"):
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
    with pytest.raises(CheckpointError, match=r"unfinished conversion.*--resume.*--overwrite"):
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
    r"the file model.safetensors has changed": changed,
    r"--seed was 0 and is 1": lambda model: {"seed": 1},
    r"--dtype was None and is bfloat16": lambda model: {"dtype": "bfloat16"},
    r"--init was project and is random": lambda model: {"init": "random"},
    r"--max-shard-size was 30000 and is 40000": lambda model: {"max_shard_size": "40KB"},
    r"the recipe has changed": lambda model: {"recipe": RECIPES["project"]},
    r"version of torch was .* and is 0.0": lambda model: {"torch": True},
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
    with pytest.raises(CheckpointError, match=f"another conversion was begun here; .*{said}"):
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
    with pytest.raises(CheckpointError, match=r"the file model\.safetensors has changed"):
        convert(model, tmp_path / "out", resume=True)


def test_resume_with_nothing_begun_begins(
    model: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    assert hashes(convert(model, tmp_path / "out", resume=True).path) == whole


SPOILED: dict[str, Any] = {
    "cut short": lambda text: text[:-9],
    "empty": lambda text: b"",
    "not JSON": lambda text: b"{{{",
    "deep": lambda text: b"[" * 100_000,
    "other things": lambda text: b'{"piece": 3, "errors": {}, "nonfinite": []}',
    "other keys": lambda text: b'{"a": 1}',
    "a list": lambda text: b"[1]",
    "not text": lambda text: b"\xff\xfe",
    "unprintable": lambda text: text.replace(b'"nonfinite": []', b'"nonfinite": ["\\u001b[2J"]'),
    "paths": lambda text: text.replace(b"model-0", b"../../elsewhere/model-0"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_record_that_is_not_whole(
    how: str,
    model: Path,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    work = begun(monkeypatch, model, out)
    record = sorted((work / "records").iterdir())[1]
    spoiled = SPOILED[how](record.read_bytes())
    assert spoiled != record.read_bytes()
    record.write_bytes(spoiled)
    convert(model, out, resume=True)
    assert hashes(out) == whole
    assert names(tmp_path) == ["m", "out"]


@pytest.mark.parametrize("how", ["cut short", "empty", "not JSON", "deep", "a list", "not text"])
def test_a_key_that_is_not_whole(
    how: str,
    model: Path,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = begun(monkeypatch, model, tmp_path / "out") / "run.json"
    key.write_bytes(SPOILED[how](key.read_bytes()))
    assert hashes(convert(model, tmp_path / "out", resume=True).path) == whole


def test_a_kill_at_each_step_of_writing_a_piece(
    model: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files under another name, a record without its files, part of the files: none is a piece."""
    out, real = tmp_path / "out", Path.replace
    for step in range(3):  # of the record, and of two files of the first piece
        seen = 0

        def rename(path: Path, target: Path, step: int = step) -> Any:
            nonlocal seen
            if path.name.startswith((".000", ".model")):
                seen += 1
                if seen > step:
                    raise Cut
            return real(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", rename)
            with pytest.raises(Cut):
                convert(model, out, max_shard_size="10KB", overwrite=True)
        places = ("checkpoint", "records")
        there = [names(ConversionDir(out).path / place) for place in places]
        assert sum(not name.startswith(".") for part in there for name in part) == step
        convert(model, out, max_shard_size="10KB", resume=True)
        if not step:
            kept = hashes(out)
        assert hashes(out) == kept
        shutil.rmtree(out)
    assert kept.keys() > whole.keys() - {name for name in whole if name.startswith("model")}


def test_files_that_were_removed_are_made_again(
    model: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    work = begun(monkeypatch, model, out, 5)
    next((work / "checkpoint").glob("model-00001-of-*.safetensors")).unlink()
    convert(model, out, resume=True)
    assert hashes(out) == whole


def test_a_piece_is_on_the_disk_before_its_record(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record of a file whose content is not there is what a power cut would leave."""
    with monkeypatch.context() as patch:
        done = disk_order(patch, "replace")
        out = convert(model, tmp_path / "out").path
    files = [*out.glob("*.safetensors")]
    assert len(files) > 4
    for file in files:
        named = next(n for n, what in enumerate(done) if getattr(what, "name", "") == file.name)
        before = done[:named]
        record = max(n for n, p in enumerate(before) if getattr(p, "parent", out).name == "records")
        assert file.stat().st_ino in before[:record]


def test_what_was_changed_since_is_found(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    work = begun(monkeypatch, model, out, 3)
    weights = sorted((work / "checkpoint").glob("*.safetensors"))[0]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="reads back differently"):
        convert(model, out, resume=True)
    assert names(tmp_path) == ["m"]


@pytest.mark.parametrize("what", ["file", "folder", "link", "linked key"])
def test_a_working_folder_that_is_none_is_left_alone(
    what: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    work = ConversionDir(out).path
    if what == "file":
        work.write_text("mine")
    elif what == "folder":
        shutil.copytree(mine, work)
    elif what == "link":
        work.symlink_to(mine)
    else:
        begun(monkeypatch, model, out)
        (work / "run.json").unlink()
        (work / "run.json").symlink_to(mine / "thesis.txt")
    for options in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(CheckpointError, match="Move it away"):
            convert(model, out, **options)
        assert (mine / "thesis.txt").read_text() == "mine"
        assert not out.exists()


def test_links_in_a_working_folder_lead_nowhere(
    model: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, mine = tmp_path / "out", tmp_path / "mine.txt"
    mine.write_text("mine")
    inside = begun(monkeypatch, model, out) / "checkpoint"
    first = next(inside.glob("model-00001-of-*.safetensors")).name
    for name in (first, "README.md", "config.json", "extra.py"):
        (inside / name).unlink(missing_ok=True)
        (inside / name).symlink_to(mine)
    (inside / "folder").mkdir()
    convert(model, out, resume=True)
    assert hashes(out) == whole
    assert mine.read_text() == "mine"
    assert not any(path.is_symlink() for path in out.iterdir())


def test_conversion_in_memory_throws_away_what_was_begun(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    begun(monkeypatch, model, out)
    in_memory(monkeypatch, model, RECIPES["random"], out, overwrite=True)
    assert names(tmp_path) == ["m", "out"]


def test_two_processes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    begun(monkeypatch, model, out)
    holder = f"import fcntl, sys; f = open({str(ConversionDir(out).path / 'lock')!r}, 'w')"
    code = f"{holder}; fcntl.flock(f, fcntl.LOCK_EX); print('in', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(CheckpointError, match="another process is converting"):
                convert(model, out, **options)
        other.communicate(b"")
    convert(model, out, resume=True)


def test_a_full_disk_keeps_what_is_done(
    recipe: Path,
    model: Path,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, real = tmp_path / "out", safetensors_io._write
    left = 100_000

    def write(file: Any, data: memoryview, digest: Any) -> None:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, data, digest)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_io, "_write", write)
        with pytest.raises(UnfinishedError, match=r"out: no space left.*--resume"):
            convert(model, out)
        words = ["convert", str(model), "-r", str(recipe), "-o", str(tmp_path / "cli")]
        ran = CliRunner().invoke(cli, words)
        assert (ran.exit_code, "--resume" in ran.stderr) == (75, True)
    shutil.rmtree(ConversionDir(tmp_path / "cli").path)
    assert names(tmp_path) == [".out.partial", "m", "r.json"]
    convert(model, out, resume=True)
    assert hashes(out) == whole


def test_a_disk_that_is_too_small_is_told_of_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(conversion_dir.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"weights take [\d,]+ bytes and 1,000 are free"):
        convert(model, tmp_path / "out")
    assert names(tmp_path) == ["m"]


def test_what_is_there_needs_no_space_again(
    model: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def size(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    convert(model, tmp_path / "undisturbed")
    work = begun(monkeypatch, model, tmp_path / "out", 4)
    usage = SimpleNamespace(free=size(tmp_path / "undisturbed") - size(work / "checkpoint"))
    monkeypatch.setattr(conversion_dir.shutil, "disk_usage", lambda path: usage)
    convert(model, tmp_path / "out", resume=True)
    assert hashes(tmp_path / "out") == whole


def test_a_real_disk_that_fills_up(
    model: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        return  # only root may mount; the tests above stand in
    try:
        # Whoever fills the disk does so after the check that there is space.
        monkeypatch.setattr(ConversionDir, "check_space", lambda *args, **options: None)
        (disk / "ballast").write_bytes(bytes(300_000))
        with pytest.raises(UnfinishedError, match="no space left for it"):
            convert(model, disk / "out")
        assert names(disk) == [".out.partial", "ballast"]
        monkeypatch.undo()  # nor is there space when it goes on, which is told of first
        with pytest.raises(UnfinishedError, match=r"are free\..*kept in .*--resume"):
            convert(model, disk / "out", resume=True)
        assert names(disk) == [".out.partial", "ballast"]
        (disk / "ballast").unlink()
        convert(model, disk / "out", resume=True)
        assert hashes(disk / "out") == whole
    finally:
        subprocess.run(["umount", str(disk)], check=True)


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


def test_what_was_replaced_comes_back_where_the_work_is_thrown_away(tmp_path: Path) -> None:
    """A kill between two renames leaves the old checkpoint inside the working folder."""
    work = ConversionDir(tmp_path / "out")
    (work.path / "old").mkdir(parents=True)
    (work.path / "old" / "config.json").write_text("{}")
    work.discard()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["config.json"]
