"""Converting piece by piece gives what converting in memory gives, and never holds the model."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from every_architecture import MLP_AND_ATTENTION, config_classes
from every_architecture import tiny_model as tiny
from helpers_checkpoint import hashes, names, same_bytes, stored, tiny_tokenizer
from helpers_streaming import (
    CANNOT,
    GROUPED,
    RECIPES,
    SMALL_SHARDS,
    contents,
    in_memory,
    mixtral,
    stored_model,
)
from safetensors.torch import load_file, save_file
from tiny import logits, tiny_model, tokens

from llmslim import api, planning
from llmslim.conversion.target_model import TargetModel
from llmslim.errors import CheckpointError, UnfinishedError
from llmslim.recipe import Recipe
from llmslim.storage import (
    NotInPiecesError,
    Pieces,
    open_source,
    parse_size,
    safetensors_io,
    write_tensors,
)

CASES = [
    ("llama", "depth", {}),
    ("phi3", "depth", {}),
    ("gpt2", "random", {}),
    ("mixtral", "depth", {}),
    ("llama", "random", {"dtype": "bfloat16"}),
    ("llama", "project", {"dtype": "float16", **SMALL_SHARDS}),
    ("bloom", "random", SMALL_SHARDS),
    *(
        pytest.param(*more, {}, marks=pytest.mark.slow)
        for more in (
            *(("llama", recipe) for recipe in ("random", "project")),
            *((name, recipe) for name in ("qwen2", "gpt_neox") for recipe in ("random", "depth")),
            ("phi3", "random"),
            ("gpt2", "depth"),
        )
    ),
]


@pytest.mark.parametrize(("architecture", "recipe", "options"), CASES)
def test_the_same_bytes_as_in_memory(
    architecture: str,
    recipe: str,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = stored_model(tmp_path / "m", architecture)
    asked = (model, RECIPES[recipe])
    streamed = api.convert(*asked, tmp_path / "a", **options)
    whole = in_memory(monkeypatch, *asked, tmp_path / "b", **options)
    assert contents(streamed.path) == contents(whole.path)
    assert streamed.report.rows == whole.report.rows
    planned = api.plan(model, RECIPES[recipe]).report().problems
    assert streamed.report.problems == planned
    in_whole = "Converted in memory, as a whole: for the sake of a test."
    assert whole.report.problems == (*planned, in_whole)
    assert api.verify(streamed.path).ok
    assert names(tmp_path) == ["a", "b", "m"]


WIDTHS = {"narrower": 64, "wider": 192}


@pytest.mark.parametrize(("width", "tied"), [("narrower", False), ("wider", True)])
def test_width_and_depth_and_blocks_together(
    width: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    recipe = {
        "name": "w",
        "init": "project",
        "depth": {"keep_layers": [3, 0]},
        "width": {"intermediate_size": WIDTHS[width]},
        "replace": [{"match": "*q_proj", "structure": "low_rank", "rank": 3}],
    }
    options: dict[str, Any] = {"max_shard_size": "25KB"}
    streamed = api.convert(tmp_path / "m", recipe, tmp_path / "a", **options).path
    whole = in_memory(monkeypatch, tmp_path / "m", recipe, tmp_path / "b", **options).path
    assert contents(streamed) == contents(whole)
    assert len(list(streamed.glob("*.safetensors"))) > 2
    assert ("lm_head.weight" in stored(streamed)) is not tied
    again = api.load(streamed)
    assert torch.equal(logits(again, tokens()), logits(api.load(whole), tokens()))


def test_one_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stored_model(tmp_path / "m", "llama")
    largest, peak = 0, 0
    real = Pieces.load

    def live(pieces: Pieces) -> int:
        tensors = pieces.model.state_dict(keep_vars=True).values()
        return sum(t.nbytes for t in {id(t): t for t in tensors if not t.is_meta}.values())

    def load(pieces: Pieces, piece: Any) -> None:
        nonlocal largest, peak
        assert live(pieces) == 0
        real(pieces, piece)
        peak = max(peak, live(pieces))
        largest = max(largest, sum(t.nbytes for _, t in pieces.tensors(piece)))

    monkeypatch.setattr(Pieces, "load", load)
    api.convert(model, RECIPES["random"], tmp_path / "out")
    assert 0 < peak <= largest
    assert peak < sum(p.nbytes for p in tiny_model("llama").parameters()) / 3


def test_experts_keep_the_names_they_are_stored_under(tmp_path: Path) -> None:
    dense = mixtral()
    dense.save_pretrained(tmp_path / "m")
    recipe = {"name": "d", "depth": {"keep_layers": [2, 1]}}
    out = api.convert(tmp_path / "m", recipe, tmp_path / "out", **SMALL_SHARDS).path
    before, after = stored(tmp_path / "m"), stored(out)
    name = "model.layers.{}.block_sparse_moe.experts.3.w2.weight"
    assert same_bytes(after[name.format(0)], before[name.format(2)])
    dense.model.layers = torch.nn.ModuleList(dense.model.layers[i] for i in (2, 1))
    for index, layer in enumerate(dense.model.layers):
        layer.self_attn.layer_idx = index
    assert torch.equal(logits(api.load(out), tokens()), logits(dense, tokens()))


def test_dense_weights_in_another_order_of_files(tmp_path: Path) -> None:
    model = stored_model(tmp_path / "m")
    plain = api.convert(model, RECIPES["random"], tmp_path / "a").path
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    parts = {f"model-{n:05}-of-00003.safetensors": sorted(tensors)[n::3] for n in range(3)}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, model / file)
    index = {"metadata": {}, "weight_map": {key: f for f, keys in parts.items() for key in keys}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = api.convert(model, RECIPES["random"], tmp_path / "b").path
    assert contents(sharded) == contents(plain)


def test_what_the_model_has_no_use_for_is_left_out(tmp_path: Path) -> None:
    model = stored_model(tmp_path / "m")
    plain = api.convert(model, RECIPES["random"], tmp_path / "a").path
    weights = model / "model.safetensors"
    extra = {**load_file(weights), "model.layers.0.rotary_emb.inv_freq": torch.ones(6)}
    save_file(extra, weights, metadata={"format": "pt"})
    assert contents(api.convert(model, RECIPES["random"], tmp_path / "b").path) == contents(plain)


def test_a_missing_weight_is_an_error_and_nothing_is_left(tmp_path: Path) -> None:
    model = stored_model(tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    tensors.pop("model.layers.2.mlp.up_proj.weight")
    tensors["model.norm.weight"] = torch.ones(47)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"^{model}: 2 .*model\.(norm|layers\.2\.mlp\.up_proj)\.weight"
    ):
        api.convert(model, RECIPES["random"], tmp_path / "out")
    assert names(tmp_path) == ["m"]


def test_tied_and_stored_twice_is_loaded_as_a_whole(tmp_path: Path) -> None:
    model = stored_model(tmp_path / "m", "llama", tie_word_embeddings=True)
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(NotInPiecesError, match=r"^lm_head\.weight "):
        Pieces(open_source(model))
    made = api.convert(model, RECIPES["random"], tmp_path / "out")
    assert (
        made.report.problems[-1]
        == "Converted in memory, as a whole: lm_head.weight is tied and stored all the same."
    )
    with pytest.raises(CheckpointError, match=rf"^{tmp_path / 'new'}: .*--resume"):
        api.convert(model, RECIPES["random"], tmp_path / "new", resume=True)


def test_weights_of_several_types_keep_all_their_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stored_model(tmp_path / "m")
    weights = model / "model.safetensors"
    tensors = {k: v.bfloat16() if "mlp" in k else v for k, v in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    streamed = api.convert(model, RECIPES["depth"], tmp_path / "a").path
    whole = in_memory(monkeypatch, model, RECIPES["depth"], tmp_path / "b").path
    assert contents(streamed) == contents(whole)
    assert {t.dtype for t in stored(streamed).values()} == {torch.float32}


def test_a_piece_that_reads_back_differently_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stored_model(tmp_path / "m")
    real = safetensors_io._write

    def spoil(file: Any, data: memoryview, digest: Any) -> None:
        real(file, data, digest)
        if len(data) == 48 * 4:  # a norm
            file.seek(-1, 1)
            file.write(bytes([data[-1] ^ 1]))

    monkeypatch.setattr(safetensors_io, "_write", spoil)
    with pytest.raises(CheckpointError, match=r"^model-\S+\.safetensors: model\.layers\.0 "):
        api.convert(model, RECIPES["random"], tmp_path / "out")
    assert names(tmp_path) == ["m"]


def test_a_piece_that_could_not_be_written_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the disk takes the pieces after it."""
    model, failed, real = stored_model(tmp_path / "m"), [], safetensors_io._write
    whole = hashes(api.convert(model, RECIPES["random"], tmp_path / "whole").path)

    def fail_once(file: Any, data: memoryview, digest: Any) -> None:
        if not failed:
            failed.append(file.name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, data, digest)

    monkeypatch.setattr(safetensors_io, "_write", fail_once)
    with pytest.raises(UnfinishedError):
        api.convert(model, RECIPES["random"], tmp_path / "out")
    again = api.convert(model, RECIPES["random"], tmp_path / "out", resume=True)
    assert hashes(again.path) == whole


def test_a_piece_with_other_tensors_than_planned_is_refused(tmp_path: Path) -> None:
    pieces = Pieces(open_source(stored_model(tmp_path / "m")))
    target = TargetModel(pieces, planning.plan(pieces.model, Recipe(name="none")), 1 << 30)
    (layer,) = (piece.name for piece in pieces.all if piece.name.endswith("layers.0"))
    (planned,) = target.files[layer].values()
    assert list(target.split(layer, planned).values()) == [planned]
    name = next(iter(planned))
    for changed in ({name: planned[name].half()}, {name: planned[name][None]}):
        with pytest.raises(CheckpointError) as caught:
            target.split(layer, {**planned, **changed})
        assert layer in str(caught.value)
        assert name in str(caught.value)


def test_an_already_slim_model_is_converted_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stored_model(tmp_path / "m")
    slim = api.convert(model, RECIPES["random"], tmp_path / "slim").path
    again = {"name": "again", "replace": [{**GROUPED, "match": "*o_proj"}]}
    streamed = api.convert(slim, again, tmp_path / "a").path
    whole = in_memory(monkeypatch, slim, again, tmp_path / "b").path
    assert contents(streamed) == contents(whole)


def test_a_file_is_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "z": torch.ones(3, dtype=torch.bfloat16),
        'ä"b': torch.ones(2, 2),
        "i": torch.ones(1, dtype=torch.int64),
        "s": torch.tensor(1.0, dtype=torch.float16),
        "e": torch.empty(0, 4),
        "u": torch.ones(5, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    digest = write_tensors(tmp_path / "ours", dict(reversed(tensors.items())))
    assert hashes(tmp_path) == {"ours": digest, "theirs": digest}


@pytest.mark.parametrize("size", ["50GB", "10KB"])
def test_files_follow_pieces_and_none_is_larger_than_allowed(size: str, tmp_path: Path) -> None:
    model = stored_model(tmp_path / "m")
    out = api.convert(model, RECIPES["random"], tmp_path / "out", max_shard_size=size).path
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    pieces = {piece.name for piece in Pieces(open_source(out)).all}
    held = [load_file(out / file) for file in files]
    for tensors in held:
        assert len({name for name in pieces for key in tensors if key.startswith(name)}) == 1
        bytes_ = sum(tensor.nbytes for tensor in tensors.values())
        assert len(tensors) == 1 or bytes_ <= parse_size(size)
    assert (len(files) == len(pieces)) is (size == "50GB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        key: file for file, tensors in zip(files, held, strict=True) for key in tensors
    }
    loaded = tf.AutoModelForCausalLM.from_pretrained(out)
    assert index["metadata"]["total_parameters"] == loaded.num_parameters()


def test_a_model_of_one_piece_is_one_file(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    model.save_pretrained(tmp_path / "m")
    pieces = Pieces(open_source(tmp_path / "m"))
    whole = pieces.all[0]._replace(
        modules=tuple(home for piece in pieces.all for home in piece.modules),
        stored=tuple(name for piece in pieces.all for name in piece.stored),
    )
    pieces.all = (whole,)
    pieces._pieces = dict.fromkeys(whole.modules, whole)
    target = TargetModel(pieces, planning.plan(pieces.model, Recipe(name="as it is")), 1 << 40)
    assert list(target.files[whole.name]) == ["model.safetensors"]
    assert target.index is None


@pytest.mark.parametrize(
    ("given", "size"),
    [("5GB", 5 * 10**9), (" 1.5 mb ", 1_500_000), ("200KB", 200_000), (123, 123), ("7", 7)],
)
def test_sizes(given: int | str, size: int) -> None:
    assert parse_size(given) == size


@pytest.mark.parametrize("given", ["", "GB", "-5GB", "5XB", "0", 0, "1e9GB", "5GiB", "9" * 40])
def test_sizes_that_are_none(given: int | str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="max_shard_size: "):
        api.convert(tmp_path, RECIPES["random"], tmp_path / "out", max_shard_size=given)


def streams_as_in_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(config_classes()[name]).save_pretrained(tmp_path / "m")
    asked = (tmp_path / "m", MLP_AND_ATTENTION)
    streamed = api.convert(*asked, tmp_path / "a")
    whole = in_memory(monkeypatch, *asked, tmp_path / "b")
    assert contents(streamed.path) == contents(whole.path)
    assert not any("in memory" in note for note in streamed.report.problems)


@pytest.mark.parametrize("name", ["xlnet", "gemma3"])
def test_parameters_outside_of_their_modules_children(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams_as_in_memory(name, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(config_classes().keys() - CANNOT.keys()))
def test_every_architecture(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams_as_in_memory(name, tmp_path, monkeypatch)
