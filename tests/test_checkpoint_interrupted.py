"""A write that cannot be finished leaves no trace, and what was there before stays."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import (
    hashes,
    names,
    slim_llama,
)
from tiny import logits, tiny_model, tokens

import llmslim.storage.write as writing
from llmslim import api
from llmslim.errors import CheckpointError
from llmslim.storage import (
    check_target,
    load_model,
    open_source,
    write_checkpoint,
)


def test_an_existing_target_is_refused_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "slim"
    out.mkdir()
    for call in (
        lambda: check_target(out),
        lambda: write_checkpoint(None, out),  # type: ignore[arg-type]
    ):
        with pytest.raises(CheckpointError, match=rf"^{out}: .*--overwrite"):
            call()
    out.rmdir()
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=rf"^{out}: .*--overwrite"):
        check_target(out)


def test_what_may_be_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match=rf"^{file}: "):
        check_target(file, overwrite=True)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}: .*config\.json"):
        check_target(tmp_path, overwrite=True)
    with pytest.raises(CheckpointError, match=rf"^{file / 'slim'}: {file} "):
        check_target(file / "slim")
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", overwrite=True)


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    out = write_checkpoint(slim_llama(), tmp_path / "slim", report={"old": True})
    model = load_model(open_source(out))  # its weights may still be mapped from the old files
    link = tmp_path / "link"
    link.symlink_to(out, target_is_directory=True)
    source = open_source(out)
    write_checkpoint(model, link, source=source, recipe_text="name: new\n", overwrite=True)
    assert link.is_symlink()
    assert not (out / "llmslim_report.json").exists()
    assert (out / "recipe.yaml").exists()
    assert names(tmp_path) == ["link", "slim"]
    again = load_model(open_source(out))
    assert torch.equal(logits(again, tokens()), logits(slim_llama(), tokens()))


FAILURES = {
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), "space"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "space"),
    "disk error": (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    "Ctrl-C": (KeyboardInterrupt(), None),
    "a mistake of ours": (ZeroDivisionError(), None),
}


STEPS = ["save_pretrained", "write_companions", "write_manifest", "fsync", "_check_model", "rename"]


@pytest.mark.parametrize(
    ("step", "failure", "overwrite"),
    [
        *((step, why, old) for step in STEPS for why in ("full disk", "Ctrl-C") for old in (0, 1)),
        *(("write_manifest", why, 0) for why in FAILURES),
    ],
)
def test_a_write_that_fails_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, failure: str, overwrite: int
) -> None:
    error, said = FAILURES[failure]
    model, out = slim_llama(), tmp_path / "slim"
    if overwrite:
        out.mkdir()
        (out / "config.json").write_text("old")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    real_rename = Path.rename

    def fail_into_place(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise error
        return real_rename(path, target)

    if step == "save_pretrained":
        monkeypatch.setattr(type(model), step, fail)
    elif step == "fsync":
        monkeypatch.setattr(os, step, fail)
    elif step == "rename":
        monkeypatch.setattr(Path, step, fail_into_place)
    else:
        monkeypatch.setattr(writing, step, fail)
    expected = CheckpointError if said else type(error)
    with pytest.raises(expected, match=said) as caught:
        write_checkpoint(model, out, report={}, overwrite=bool(overwrite))
    if said:
        assert str(out) in str(caught.value)
    monkeypatch.undo()
    assert names(tmp_path) == (["slim"] if overwrite else [])
    if overwrite:
        assert hashes(out).keys() == {"config.json"}
        assert (out / "config.json").read_text() == "old"


def test_a_disk_that_really_takes_no_more(tmp_path: Path) -> None:
    model, out = slim_llama(), tmp_path / "slim"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            write_checkpoint(model, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value).startswith(f"{out}: no space left for it")
    assert names(tmp_path) == []


def test_a_write_that_does_not_load_back_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = slim_llama()
    real = type(model).save_pretrained

    def spoil(self: Any, folder: Path, **options: Any) -> None:
        real(self, folder, **options)
        path = Path(folder) / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(type(model), "save_pretrained", spoil)
    with pytest.raises(CheckpointError, match=r": 1 .*model\.norm\.weight"):
        write_checkpoint(model, tmp_path / "slim")
    assert names(tmp_path) == []


def test_save_replaces_nothing_unasked(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    api.save(model, tmp_path / "out")
    before = hashes(tmp_path)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    with pytest.raises(CheckpointError):
        api.save(model, tmp_path / "out")
    assert hashes(tmp_path) == before
    api.save(model, tmp_path / "out", overwrite=True)
    assert hashes(tmp_path) != before
