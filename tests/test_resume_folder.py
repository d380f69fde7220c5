"""A working folder that was damaged, replaced or linked: what becomes of the conversion in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_checkpoint import disk_order, hashes, names
from helpers_resume import Cut, begun, convert
from helpers_resume import model as model
from helpers_resume import original as original
from helpers_resume import whole as whole
from helpers_streaming import RECIPES, in_memory

from llmslim.conversion.conversion_dir import ConversionDir
from llmslim.errors import CheckpointError

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
    with pytest.raises(CheckpointError, match=rf"^{weights.name}: "):
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
        with pytest.raises(CheckpointError, match=rf"^{work}: "):
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
            with pytest.raises(CheckpointError, match=rf"^{ConversionDir(out).path}: .* process "):
                convert(model, out, **options)
        other.communicate(b"")
    convert(model, out, resume=True)


def test_what_was_replaced_comes_back_where_the_work_is_thrown_away(tmp_path: Path) -> None:
    """A kill between two renames leaves the old checkpoint inside the working folder."""
    work = ConversionDir(tmp_path / "out")
    (work.path / "old").mkdir(parents=True)
    (work.path / "old" / "config.json").write_text("{}")
    work.discard()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["config.json"]
