"""Fits to calibration text layer by layer from the disk: the bytes are those made in memory."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from every_architecture import NOT_FITTED, config_classes
from every_architecture import tiny_model as tiny
from helpers_calibrated import RECIPES, begun, model_folder, recipe, resumed
from helpers_calibrated import text as text  # a fixture
from helpers_checkpoint import hashes, names, stored, tiny_tokenizer
from helpers_streaming import CANNOT, contents, in_memory
from safetensors.torch import load_file, save_file

from llmslim import api
from llmslim.anatomy.sites import find_layers
from llmslim.conversion import conversion_dir, whole_model
from llmslim.conversion.conversion_dir import ConversionDir
from llmslim.conversion.layer_store import LayersOnDisk, check_layers
from llmslim.data import windows
from llmslim.data.windows import OWN_TEXT
from llmslim.errors import CheckpointError, DataError
from llmslim.fitting import cost
from llmslim.recipe import Recipe
from llmslim.storage import NotInPiecesError, Pieces, load_model, open_source


@pytest.mark.parametrize(
    ("architecture", "name", "options"),
    [
        ("llama", "learned", {"dtype": "bfloat16"}),
        ("llama", "width", {}),
        ("llama", "wider", {}),
        ("llama", "some", {"tie_word_embeddings": False}),
        ("phi3", "grouped", {"dtype": "bfloat16"}),
        ("mixtral", "low_rank", {}),
        ("phi3", "trained", {"dtype": "bfloat16"}),
        ("llama", "auto", {}),
        ("llama", "own text", {}),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in (
                ("llama", "depth", {}),
                ("gpt2", "width", {}),
                ("mistral", "refine", {"dtype": "bfloat16"}),
                ("gemma", "learned", {"tie_word_embeddings": True}),
                ("llama", "low_rank", {}),
                ("phi3", "width", {}),
                ("phi3", "depth", {}),
                ("gpt2", "low_rank", {}),
                ("mixtral", "depth", {}),
                ("gemma", "depth", {"tie_word_embeddings": True, "dtype": "bfloat16"}),
                ("bloom", "grouped", {}),
            )
        ),
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


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        *(("depth", pieces) for pieces in (0, 2, 3, 5)),
        *(pytest.param("depth", pieces, marks=pytest.mark.slow) for pieces in (1, 4)),
        ("some", 2),
        ("width", 3),
    ],
)
def test_resumed_ends_in_the_same_bytes(
    name: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_folder(tie_word_embeddings=False)
    undisturbed = hashes(api.convert(model, recipe(name), "a").path)
    begun(monkeypatch, model, name, pieces)
    fitted = resumed(model, name)
    assert hashes(Path("out")) == undisturbed
    assert names(Path()) == ["a", "m", "out", "text.txt"]
    finished = tuple(f"model.layers.{index}." for index in range(pieces))
    assert not any(what.startswith(finished) for _, what in fitted)
    assert [done for done, _ in fitted] == sorted({done for done, _ in fitted})
    assert bool(fitted) == (pieces < 4)


@pytest.mark.parametrize("kept", [0, 1])
def test_hidden_states_that_were_changed_are_not_gone_on_from(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_folder()
    undisturbed = hashes(api.convert(model, recipe("low_rank"), "a").path)
    streams = begun(monkeypatch, model, "low_rank", 3) / "streams"
    for path in sorted(streams.iterdir())[kept:]:
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
    fitted = resumed(model, "low_rank")
    assert fitted[0][1].startswith(f"model.layers.{2 if kept else 0}.")
    assert hashes(Path("out")) == undisturbed


def test_hidden_states_of_two_layers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before and after the last finished layer, and those of the one that was cut short."""
    work = begun(monkeypatch, model_folder(), "low_rank", 3)
    assert names(work / "streams") == ["after-1", "after-2", "after-3"]


def test_another_text_is_not_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_folder()
    work = begun(monkeypatch, model, "low_rank", 1)
    before = hashes(work)
    text = Path("text.txt").read_text()
    Path("text.txt").write_text(text[::-1])
    with pytest.raises(CheckpointError, match=r"calibration text .*--overwrite"):
        resumed(model, "low_rank")
    Path("text.txt").write_text(text)
    with pytest.raises(CheckpointError, match=r"--calibration-tokens .*None .*128"):
        resumed(model, "low_rank", calibration_tokens=128)
    assert hashes(work) == before


def test_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_folder()
    lent: list[list[str]] = []
    real = LayersOnDisk.layer

    def alive(pieces: Pieces) -> list[str]:
        return [name for name, tensor in pieces.model.state_dict().items() if not tensor.is_meta]

    @contextmanager
    def layer(self: LayersOnDisk, index: int) -> Any:
        assert alive(self._pieces) == []
        with real(self, index):
            lent.append(alive(self._pieces))
            yield

    monkeypatch.setattr(LayersOnDisk, "layer", layer)
    api.convert(model, recipe("depth"), "out")
    assert len(lent) == 4  # the layer that is dropped is run, too
    for index, there in enumerate(lent):
        assert there
        assert all(name.startswith(f"model.layers.{index}.") for name in there)


def test_layers_after_the_last_block_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_folder()
    lent: list[int] = []
    real = LayersOnDisk.layer
    monkeypatch.setattr(
        LayersOnDisk, "layer", lambda self, index: (lent.append(index), real(self, index))[1]
    )
    api.convert(model, recipe("some"), "out")
    assert lent == [0, 1, 2]


def test_a_budget_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_folder()
    undisturbed = hashes(api.convert(model, recipe("auto"), "a").path)
    work = begun(monkeypatch, model, "auto", 2)
    assert Recipe.load(work / "recipe.yaml").budget is None

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(whole_model.fitting, "allocate", again)
    resumed(model, "auto")
    assert hashes(Path("out")) == undisturbed


GIVEN: dict[str, Any] = {"calibration": "text.txt", "calibration_tokens": 256}


def test_a_text_comes_with_text_of_the_models_own() -> None:
    model, rules = model_folder(), {"name": "r", "replace": RECIPES["low_rank"]["replace"]}
    alone = api.convert(model, rules, "alone", own_text=False, **GIVEN)
    both = api.convert(model, rules, "both", **GIVEN)
    named = api.convert(
        model, rules, "named", calibration=["text.txt", "self"], calibration_tokens=256
    )
    weights = [path.name for path in named.path.glob("*.safetensors")]
    assert {hashes(both.path)[name] == hashes(named.path)[name] for name in weights} == {True}
    assert "text.txt" in alone.report.fitted_to
    assert OWN_TEXT not in alone.report.fitted_to
    assert f"text.txt, {OWN_TEXT}" in both.report.fitted_to


@pytest.mark.parametrize("why", ["memory", "not finite"])
def test_text_of_its_own_that_a_model_cannot_write_is_left_out(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rules = model_folder(), {"name": "r", "replace": RECIPES["low_rank"]["replace"]}
    wanted = stored(api.convert(model, rules, "a", own_text=False, **GIVEN).path)

    def refuse(*_: Any, **__: Any) -> None:
        raise DataError("its logits are not finite.")

    if why == "memory":
        monkeypatch.setattr(cost.psutil, "virtual_memory", lambda: SimpleNamespace(available=10))
    else:
        monkeypatch.setattr(windows, "sampled_windows", refuse)
    done = api.convert(model, rules, "out", **GIVEN)
    found = stored(done.path)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [note for note in done.report.problems if why in note]
    if why == "not finite":
        with pytest.raises(DataError):
            api.convert(model, rules, "asked", calibration=["text.txt", "self"])


def test_weights_that_are_not_finite_are_found_before_any_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_folder()
    tensors = load_file(model / "model.safetensors")
    for name in ("model.layers.3.mlp.up_proj.weight", "model.norm.weight"):
        tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    reported: list[str] = []
    asked: Any = (model, recipe("some"))
    with pytest.raises(CheckpointError, match=r"m: 2 .* NaN "):
        api.convert(*asked, "out", progress=lambda done, total, what: reported.append(what))
    assert not any("layers" in what for what in reported)
    assert names(Path()) == ["m", "text.txt"]
    streamed = api.convert(*asked, "a", allow_nonfinite=True)
    whole = in_memory(monkeypatch, *asked, "b", allow_nonfinite=True)
    assert contents(streamed.path) == contents(whole.path)
    assert any("2 tensors hold NaN" in note for note in streamed.report.problems)
    assert streamed.report.problems == whole.report.problems[:-1]


def test_a_disk_without_space_for_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_folder()
    monkeypatch.setattr(
        conversion_dir.shutil, "disk_usage", lambda path: SimpleNamespace(free=400_000)
    )
    api.convert(model, {"name": "p", "replace": RECIPES["low_rank"]["replace"]}, "out")
    with pytest.raises(CheckpointError, match=r"552,960, .* 400,000 "):
        api.convert(model, recipe("low_rank"), "new")


TABLES = ["llama", "gptj", "gpt_neo", "falcon_h1", "codegen", "bloom", "gemma3_text"]


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_no_file_holds_are_those_of_the_whole_model(name: str) -> None:
    tiny(config_classes()[name]).save_pretrained("m")
    source = open_source("m")
    pieces, whole = Pieces(source), load_model(source)
    for _ in range(2):  # whoever needs them makes sure of them
        pieces.make_tables()
    for piece in pieces.all:
        pieces.load(piece)
        pieces.release(piece)
        pieces.load(piece)
    tables = dict(pieces.model.named_non_persistent_buffers())
    wanted = dict(whole.named_non_persistent_buffers())
    assert tables.keys() == wanted.keys()
    for key, table in tables.items():
        assert torch.equal(table, wanted[key])
    for (key, ours), theirs in zip(
        pieces.model.state_dict().items(), whole.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), key


def test_layers_that_share_weights_are_fitted_in_memory() -> None:
    model = Pieces(open_source(model_folder()))
    joined = model.all[1]._replace(modules=("model.layers.0", "model.layers.1"))
    model._pieces |= dict.fromkeys(joined.modules, joined)
    with pytest.raises(NotInPiecesError, match=r"^model\.layers\.0 "):
        check_layers(model)


FITTED = sorted(config_classes().keys() - CANNOT.keys() - NOT_FITTED.keys() - {"blt"})


@pytest.mark.slow
@pytest.mark.parametrize("name", FITTED)
def test_every_architecture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny(config_classes()[name])
    dense.save_pretrained("m")
    tiny_tokenizer().save_pretrained("m")
    rule = {"match": f"{find_layers(dense).path}.*", "structure": "low_rank", "keep_ratio": 0.5}
    calibration = {"data": "text.txt", "tokens": 96, "sequence_length": 16}
    asked: Any = {"init": "least_squares", "calibration": calibration, "replace": [rule]}
    streamed = api.convert("m", {"name": "r", **asked}, "a")
    whole = in_memory(monkeypatch, "m", {"name": "r", **asked}, "b")
    assert contents(streamed.path) == contents(whole.path)
    assert not any("in memory" in note for note in streamed.report.problems)


@pytest.mark.slow
def test_killed_at_thirty_random_moments() -> None:
    model = model_folder()
    undisturbed = hashes(api.convert(model, recipe("low_rank"), "a").path)
    start = time.perf_counter()
    api.convert(model, recipe("low_rank"), "b")
    longest = 1.2 * (time.perf_counter() - start)
    for seed in range(30):
        child = os.fork()
        if child == 0:
            try:
                api.convert(model, recipe("low_rank"), "out", resume=True, overwrite=True)
            finally:
                os._exit(0)
        time.sleep(random.Random(seed).uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if Path("out").exists():
            assert hashes(Path("out")) == undisturbed
        if seed % 3 == 2:
            api.convert(model, recipe("low_rank"), "out", resume=True, overwrite=True)
            assert hashes(Path("out")) == undisturbed
            assert not ConversionDir(Path("out")).exists
