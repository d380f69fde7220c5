"""Fits on another device than the processor: found, refused, and the same fit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import hashes, names, tiny_tokenizer
from helpers_healing import healed, slimmed, text
from helpers_streaming import contents, in_memory, mixtral, stored_model
from tiny import few, logits, tiny_model, tokens

import llmslim
from llmslim import api, fitting
from llmslim.anatomy.device import device_named
from llmslim.conversion.layer_store import LayersOnDisk
from llmslim.data import Windows
from llmslim.errors import CheckpointError, SlimError, UnfinishedError
from llmslim.fitting import layerwise
from llmslim.fitting.calibration import windows_per_batch

WINDOWS = Windows(tokens(16, 64), "random tokens", tokens(8, 64, seed=5))
STRUCTURES: list[dict[str, Any]] = [
    {"structure": "width"},
    {"structure": "low_rank"},
    {"structure": "block_shuffle"},
    {"structure": "grouped_low_rank"},
    {"structure": "pivoted_low_rank"},
    {"structure": "grouped_pointwise", "channel_order": "learned"},
]


def recipe(**options: Any) -> dict[str, Any]:
    rule = {"match": "*.mlp.*", "keep_ratio": 0.5, "structure": "low_rank", **options}
    calibration = {"data": "text.txt", "tokens": 256, "sequence_length": 32}
    return {"init": "least_squares", "calibration": calibration, "replace": [rule]}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stored model in a working directory that has a text, too."""
    monkeypatch.chdir(tmp_path)
    words = random.Random(0).choices(["one", "two", "or three", "trees;", "so", "it"], k=2000)
    Path("text.txt").write_text(" ".join(words))
    folder = stored_model(Path("m"), "llama", tie_word_embeddings=False)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["cuda:99", "meta", "gpu", ""])
def test_a_device_that_is_not_there_is_refused(model: Path, name: str) -> None:
    with pytest.raises(SlimError, match=rf"^device: '{name}'; .* cpu\."):
        api.convert(model, recipe(), "out", device=name)
    assert names(Path()) == ["m", "text.txt"]


def test_without_a_gpu_it_is_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_named(None) == torch.device("cpu")


def test_a_conversion_that_runs_out_of_memory_can_go_on(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.convert(model, recipe(), "a")
    real = LayersOnDisk.finished

    def full(self: Any, index: int, *rest: Any) -> Any:
        if index == 2:
            raise torch.OutOfMemoryError
        return real(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(LayersOnDisk, "finished", full)
        with pytest.raises(
            UnfinishedError, match=r"^device: cpu; .*--calibration-tokens.*--resume"
        ):
            api.convert(model, recipe(), "out", device="cpu")
    assert names(Path()) == [".out.partial", "a", "m", "text.txt"]
    with pytest.raises(CheckpointError, match=r"--device .*cpu .*cpu:0"):
        api.convert(model, recipe(), "out", device="cpu:0", resume=True)
    api.convert(model, recipe(), "out", resume=True, device="cpu")
    assert hashes(Path("out")) == hashes(Path("a"))


def test_measuring_a_budget_that_runs_out_of_memory_can_go_on(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fitting, "allocate", full)
    rule = {"match": "*.mlp.*", "structure": "auto"}
    with pytest.raises(UnfinishedError, match="--device cpu"):
        api.convert(model, recipe() | {"budget": 0.5, "replace": [rule]}, "out")
    assert names(Path()) == [".out.partial", "m", "text.txt"]


def test_a_gpu_is_given_as_many_windows_as_divide_all_parts() -> None:
    parts = [torch.zeros(count, 512) for count in (32, 384, 24)]
    assert windows_per_batch(parts, torch.device("cuda")) == 8
    assert windows_per_batch(parts, torch.device("cpu")) == 1
    assert windows_per_batch([torch.zeros(12, 512), *parts], torch.device("cuda")) == 4
    assert windows_per_batch([*parts, torch.zeros(5, 512)], torch.device("cuda")) == 1
    assert windows_per_batch([torch.zeros(6, 8192)], torch.device("cuda")) == 1


@pytest.mark.parametrize("architecture", few(["llama", "gpt2", "mistral"], ["llama"]))
def test_windows_fitted_together_are_fitted_as_one_by_one(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what a token counts for, next to those it is run with, may differ a little."""
    errors = []
    for size in (1, 4):
        monkeypatch.setattr(layerwise, "windows_per_batch", lambda *_, n=size: n)
        model = tiny_model(architecture)
        refine = {"steps": 4, "end_to_end": {"steps": 2}}
        report = llmslim.slim(model, recipe() | {"refine": refine}, calibration=WINDOWS)
        errors.append([row.init_error for row in report.rows if row.init_error is not None])
    assert len(errors[0]) >= 8
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        *(("llama", options) for options in STRUCTURES),
        *(("phi3", options) for options in STRUCTURES),
        *(("gpt2", options) for options in STRUCTURES[:2]),
        ("mixtral", STRUCTURES[1]),
    ],
    ids=lambda value: value if isinstance(value, str) else value["structure"],
)
def test_a_fit_on_a_gpu_is_the_fit_on_the_processor(
    architecture: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truth: the same sums, in the same type, on the processor."""
    monkeypatch.setattr(layerwise, "fast_type", lambda *_: None)
    errors = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = mixtral() if architecture == "mixtral" else tiny_model(architecture)
        model.to(device)
        asked = recipe(**options, match=["*.mlp.*", "*.experts.*"])
        report = llmslim.slim(model, asked, calibration=WINDOWS)
        assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {device}
        errors.append([row.init_error for row in report.rows if row.init_error is not None])
    assert errors[0]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [*STRUCTURES, {"structure": "auto"}], ids=str)
def test_a_refined_fit_on_a_gpu_is_nearer(options: dict[str, Any]) -> None:
    rule = recipe(**options)
    if options["structure"] == "auto":
        rule["budget"] = rule["replace"][0].pop("keep_ratio")
    first = []
    for refine in (None, {"steps": 16, "lr": 0.02}):
        model = tiny_model("llama", num_hidden_layers=2).to("cuda")
        report = llmslim.slim(model, rule | {"refine": refine}, calibration=WINDOWS)
        # What the descent makes small is the layer's output, which the last of them writes.
        first.append(next(r.init_error for r in report.rows if r.name.endswith("down_proj")))
    assert first[1] < 0.97 * first[0]


@pytest.mark.gpu
def test_a_conversion_on_a_gpu_layer_by_layer_is_the_one_in_memory(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device_named(None) == torch.device("cuda")
    streamed = api.convert(model, recipe(), "a")
    whole = in_memory(monkeypatch, model, recipe(), "b")
    assert contents(streamed.path) == contents(whole.path)
    processor = api.convert(model, recipe(), "c", device="cpu")
    near = [row.init_error for row in processor.report.rows]
    assert [row.init_error for row in streamed.report.rows] == [
        None if error is None else pytest.approx(error, rel=0.05) for error in near
    ]


@pytest.mark.gpu
def test_healing_uses_the_gpu(tmp_path: Path) -> None:
    model, teacher = slimmed(), tiny_model()
    ids = text().train.ids
    before = (logits(model, ids) - logits(teacher, ids)).square().mean()
    report = healed(model, tmp_path / "w", text(), teacher=teacher, epochs=16, learning_rate=3e-3)
    assert report.loss_after < report.loss_before
    after = (logits(model.cpu(), ids) - logits(teacher.cpu(), ids)).square().mean()
    assert after < before / 2
