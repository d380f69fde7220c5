"""Conversions that fit to text: recipes, a text in the working directory, tiny models, cuts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import tiny_tokenizer
from helpers_resume import Cut, cut_after
from helpers_streaming import stored_model
from safetensors.torch import load_file, save_file

from llmslim import api
from llmslim.conversion.conversion_dir import ConversionDir

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
    "trained": {
        "refine": {"steps": 0, "end_to_end": {"steps": 8, "tokens": 64}},
        "depth": {"keep_layers": [0, 3, 2]},
        "replace": [LOW_RANK],
    },
    "auto": {"budget": 0.6, "replace": [{"match": "*.mlp.*", "structure": "auto"}]},
    "own text": {
        "calibration": {**CALIBRATION, "data": ["text.txt", "self"]},
        "replace": [LOW_RANK],
    },
    "wider": {
        "width": {"intermediate_size": 192},
        "replace": [{"match": "*.1.*.q_proj", "structure": "low_rank", "rank": 3}],
    },
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


def begun(monkeypatch: pytest.MonkeyPatch, model: Path, name: str, pieces: int) -> Path:
    """Leave an unfinished conversion to `out`; return its folder."""
    with monkeypatch.context() as patch:
        cut_after(patch, pieces, Cut())
        with pytest.raises(Cut):
            api.convert(model, recipe(name), "out")
    return ConversionDir(Path("out")).path


def resumed(model: Path, name: str, **options: Any) -> list[tuple[int, str]]:
    """Resume it; return the steps reported that fit sites in decoder layers."""
    reported: list[tuple[int, str]] = []
    options["progress"] = lambda done, _, what: reported.append((done, what))
    api.convert(model, recipe(name), "out", resume=True, **options)
    return [step for step in reported if "layers" in step[1]]
