"""Fits to calibration text, layer by layer from the disk: the same bytes as in memory, resumed too."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import hashes, names, tiny_tokenizer
from helpers_streaming import contents, in_memory, stored_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from llmslim import api
from llmslim.checkpoint import Pieces
from llmslim.checkpoint import tensor_files as writing
from llmslim.conversion.work import Work
from llmslim.errors import CheckpointError

MLP = ["*.mlp.*", "*.experts.*"]
LOW_RANK = {"match": MLP, "structure": "low_rank", "keep_ratio": 0.5}
GROUPED = {"match": MLP, "structure": "grouped_pointwise", "groups": 4}
LEARNED = {"match": "*.mlp.*", "structure": "grouped_pointwise", "groups": 4}
LEARNED["channel_order"] = "learned"
CALIBRATION = {"data": "text.txt", "tokens": 256, "sequence_length": 32}
RECIPES: dict[str, dict[str, Any]] = {
    "low_rank": {"replace": [LOW_RANK]},
    "grouped": {"replace": [GROUPED]},
    "learned": {"replace": [LEARNED]},
    "width": {"replace": [{"match": "*.mlp.*", "structure": "width", "keep_ratio": 0.5}]},
    "depth": {"depth": {"keep_layers": [0, 3, 2]}, "replace": [LOW_RANK]},
    "refine": {"refine": {"steps": 4}, "replace": [LOW_RANK]},
    "some": {
        "replace": [
            {"match": "*.1.*_proj", "structure": "low_rank", "rank": 3},
            {"match": ["*.2.mlp.*", "lm_head"], "structure": "low_rank", "rank": 4,
             "init": "project"},
        ]
    },
}  # fmt: skip


def recipe(name: str) -> dict[str, Any]:
    """Return a recipe that fits to text in the working directory."""
    return {"name": name, "init": "least_squares", "calibration": CALIBRATION, **RECIPES[name]}


@pytest.fixture(autouse=True)
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a text into the working directory, which is empty but for it."""
    monkeypatch.chdir(tmp_path)
    words = random.Random(0).choices(["one", "two", "or three", "trees;", "so", "it"], k=2000)
    Path("text.txt").write_text(" ".join(words))


def model_folder(architecture: str = "llama", dtype: str = "float32", **changes: Any) -> Path:
    folder = stored_model(Path("m"), architecture, **changes)
    tiny_tokenizer().save_pretrained(folder)
    if dtype != "float32":
        tensors = load_file(folder / "model.safetensors")
        tensors = {key: tensor.to(getattr(torch, dtype)) for key, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("architecture", "name", "options"),
    [
        ("llama", "low_rank", {}),
        ("llama", "learned", {"dtype": "bfloat16"}),
        ("llama", "width", {}),
        ("llama", "depth", {}),
        ("llama", "some", {"tie_word_embeddings": False}),
        ("phi3", "grouped", {"dtype": "bfloat16"}),
        ("phi3", "width", {}),
        ("phi3", "depth", {}),
        ("gpt2", "low_rank", {}),
        ("gpt2", "width", {}),
        ("mixtral", "low_rank", {}),
        ("mixtral", "depth", {}),
        ("gemma", "learned", {"tie_word_embeddings": True}),
        ("gemma", "depth", {"tie_word_embeddings": True, "dtype": "bfloat16"}),
        ("bloom", "grouped", {}),
        ("mistral", "refine", {"dtype": "bfloat16"}),
    ],
)
def test_the_same_bytes_as_in_memory(
    architecture: str, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_folder(architecture, **options)
    asked: Any = {"max_shard_size": "60KB"}
    streamed = api.convert(model, recipe(name), "a", **asked)
    whole = in_memory(monkeypatch, model, recipe(name), "b", **asked)
    assert contents(streamed.path) == contents(whole.path)
    assert streamed.report.rows == whole.report.rows
    assert (*streamed.report.problems, whole.report.problems[-1]) == whole.report.problems
    assert any(row.init_error for row in streamed.report.rows)
    assert names(Path()) == ["a", "b", "m", "text.txt"]


class Cut(BaseException):
    """A kill, as far as one process can do it to itself: nothing may tidy up after it."""


def cut_after(patch: pytest.MonkeyPatch, pieces: int) -> None:
    """Fail while the piece after so many is handed over."""
    real, seen = writing.TensorFiles.put, 0

    def put(self: Any, *args: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > pieces:
            self.wait()
            raise Cut
        real(self, *args)

    patch.setattr(writing.TensorFiles, "put", put)


@pytest.mark.parametrize("name", ["depth", "some"])
@pytest.mark.parametrize("pieces", range(7))
def test_resumed_ends_in_the_same_bytes(
    pieces: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_folder(tie_word_embeddings=False)
    undisturbed = hashes(api.convert(model, recipe(name), "a").path)
    with monkeypatch.context() as patch:
        cut_after(patch, pieces)
        with pytest.raises(Cut):
            api.convert(model, recipe(name), "out")
    steps: list[tuple[int, str]] = []
    api.convert(
        model,
        recipe(name),
        "out",
        resume=True,
        progress=lambda at, _, what: steps.append((at, what)),
    )
    assert hashes(Path("out")) == undisturbed
    assert names(Path()) == ["a", "m", "out", "text.txt"]
    fitted = [step for step in steps if "layers" in step[1]]
    finished = tuple(f"model.layers.{index}." for index in range(pieces))
    assert not any(what.startswith(finished) for _, what in fitted)
    assert [at for at, _ in fitted] == sorted({at for at, _ in fitted})
    assert not fitted or pieces < 4
