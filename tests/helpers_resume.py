"""What the tests of interrupted conversions share: a model, and ways to stop its conversion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers_checkpoint import hashes
from helpers_streaming import RECIPES, SMALL_SHARDS, stored_model

from llmslim import api
from llmslim.conversion.conversion_dir import ConversionDir
from llmslim.conversion.finished import FinishedPieces

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
