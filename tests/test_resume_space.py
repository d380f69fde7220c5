"""A conversion on a disk that is full, too small, or fills up."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from helpers_checkpoint import hashes, names
from helpers_resume import begun, convert
from helpers_resume import model as model
from helpers_resume import original as original
from helpers_resume import recipe as recipe
from helpers_resume import whole as whole

from llmslim.cli.main import cli
from llmslim.conversion import conversion_dir
from llmslim.conversion.conversion_dir import ConversionDir
from llmslim.errors import CheckpointError, UnfinishedError
from llmslim.storage import safetensors_io


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
        with pytest.raises(UnfinishedError, match=rf"^{out}: .*--resume"):
            convert(model, out)
        words = ["convert", str(model), "-r", str(recipe), "-o", str(tmp_path / "cli")]
        ran = CliRunner().invoke(cli, words)
        assert (ran.exit_code, "--resume" in ran.stderr) == (75, True)
    shutil.rmtree(ConversionDir(tmp_path / "cli").path)
    assert names(tmp_path) == [".out.partial", "m", "r.json"]
    convert(model, out, resume=True)
    assert hashes(out) == whole


def test_a_disk_that_is_too_small_is_reported_of_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(conversion_dir.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"out: .* [\d,]{5,} bytes .* 1,000 "):
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
        with pytest.raises(UnfinishedError, match=rf"^{disk / 'out'}: "):
            convert(model, disk / "out")
        assert names(disk) == [".out.partial", "ballast"]
        monkeypatch.undo()  # nor is there space to continue, which the message names first
        with pytest.raises(UnfinishedError, match=rf"{disk / '.out.partial'}.*--resume"):
            convert(model, disk / "out", resume=True)
        assert names(disk) == [".out.partial", "ballast"]
        (disk / "ballast").unlink()
        convert(model, disk / "out", resume=True)
        assert hashes(disk / "out") == whole
    finally:
        subprocess.run(["umount", str(disk)], check=True)
