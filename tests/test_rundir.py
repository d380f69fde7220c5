"""What a folder of unfinished work keeps: on the disk, of a known form, fit for a terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers_checkpoint import disk_order

from llmslim.errors import CheckpointError
from llmslim.storage import write_whole
from llmslim.storage.rundir import RUN, RunDir


@pytest.fixture
def work(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "w", "conversion", "converting", re.compile(r"x$"), CheckpointError)


def test_a_text_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = disk_order(monkeypatch, "replace")
    file = tmp_path / "record.json"
    write_whole(file, "text")
    assert done == [file.stat().st_ino, file, tmp_path.stat().st_ino]
    assert file.read_text() == "text"


def test_work_of_another_form_is_not_continued(work: RunDir) -> None:
    with work.held():
        work.begin({"seed": 1})
    assert work.resume({"seed": 1}) is not None
    file = work.path / RUN
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "format": data["format"] + 1}))
    assert work.resume({"seed": 1}) is None


def test_a_key_that_somebody_made_cannot_steer_a_terminal(work: RunDir) -> None:
    with work.held():
        work.begin({"\x1b[2J": 1, "seed": "\x1b[2J"})
    with pytest.raises(CheckpointError) as caught:
        work.resume({"seed": "2"})
    assert "seed" in str(caught.value)
    assert str(caught.value).isprintable()
