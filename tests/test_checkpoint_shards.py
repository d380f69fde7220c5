"""What is found wrong in safetensors files and their index before anything is loaded."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmslim.errors import CheckpointError
from llmslim.storage.safetensors_io import INDEX, Entry, read_header, read_weights, weight_files

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}


def raw(header: Any, data: bytes = bytes(24)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def b(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "b": {**GOOD["b"], **changes}}


def test_a_header_is_read_as_safetensors_wrote_it(tmp_path: Path) -> None:
    tensors = {
        "f": torch.ones(3, 5),
        "h": torch.ones(7, dtype=torch.bfloat16),
        "i": torch.ones(2, 1, 2, dtype=torch.int64),
        "flag": torch.ones(3, dtype=torch.bool),
        "none": torch.ones(0, 4),
        "scalar": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    path = tmp_path / "x.safetensors"
    assert read_header(path) == {
        "f": Entry("F32", (3, 5), path),
        "h": Entry("BF16", (7,), path),
        "i": Entry("I64", (2, 1, 2), path),
        "flag": Entry("BOOL", (3,), path),
        "none": Entry("F32", (0, 4), path),
        "scalar": Entry("F32", (), path),
    }


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_length_that_begins_as_a_pickle_does(length: int, tmp_path: Path) -> None:
    header = json.dumps(GOOD).encode().ljust(length)
    (tmp_path / "x.safetensors").write_bytes(raw(header))
    assert list(read_header(tmp_path / "x.safetensors")) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "header too small"),
        (raw(GOOD)[:60], "invalid header length"),
        (raw(b"{not json"), "JSON"),
        (raw(b(data_offsets=[8, 16])), "`b`"),  # overlaps
        (raw(b(data_offsets=[20, 28]), bytes(28)), "`b`"),  # leaves a gap
        (raw(b(shape=[5])), "shape"),
        (raw(b(dtype="F99")), "F99"),
        (raw(GOOD, bytes(23)), "not fully covered"),
        (raw(GOOD, bytes(25)), "not fully covered"),
        (raw({"a": GOOD["a"], "\x1b[2J": GOOD["b"]}), "not printable"),
        (raw({"a": GOOD["a"], "\x1b[2J": {**GOOD["b"], "shape": [5]}}), "shape"),
        (raw({"a": GOOD["a"], "\x1b[2J": {**GOOD["b"], "data_offsets": [8, 16]}}), "`?[2J`"),
        (raw({"a": GOOD["a"], "b" * 1001: GOOD["b"]}), "longer than 1000"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    (sentence,) = caught.value.problems
    assert sentence.startswith(f"{path}: ")
    assert said in sentence
    assert sentence.isprintable()


def test_every_cut_of_a_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    whole = raw(GOOD)
    path.write_bytes(whole)
    assert set(read_header(path)) == {"a", "b"}
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read_header(path)


def sharded(folder: Path) -> dict[str, Any]:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(3)}, folder / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert read_weights(tmp_path) == {
        "a": Entry("F32", (2,), tmp_path / "one.safetensors"),
        "b": Entry("F32", (3,), tmp_path / "two.safetensors"),
    }
    assert [path.name for path in weight_files(tmp_path)] == ["one.safetensors", "two.safetensors"]


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "not JSON"),
        ("[]", "holds a list; it must be a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["one.safetensors"]}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "something else than file names"),
        ('{"weight_map": {"a": "three.safetensors"}}', "three.safetensors is missing"),
        ('{"weight_map": {"a": ".."}}', "names '..', which is outside"),
        ('{"weight_map": {"a": ""}}', "names '', which is outside"),
        ('{"weight_map": {"a": "../outside.safetensors"}}', "which is outside"),
        ('{"weight_map": {"a": "sub/../one.safetensors"}}', "which is outside"),
        ('{"weight_map": {"a": "OUTSIDE"}}', "which is outside"),
        ('{"weight_map": {"a": "link.safetensors"}}', "which is outside"),
        ('{"weight_map": {"a": "folder"}}', "folder is missing"),
        ('{"weight_map": {"z": "one.safetensors"}}', "one.safetensors: does not hold z"),
    ],
)
def test_an_index_that_cannot_be_trusted(tmp_path: Path, index: str, said: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    sharded(folder)
    outside = tmp_path / "outside.safetensors"
    save_file({"a": torch.ones(2)}, outside)
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "folder").mkdir()
    (folder / INDEX).write_text(index.replace("OUTSIDE", str(outside)))
    with pytest.raises(CheckpointError) as caught:
        read_weights(folder)
    assert said in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    path = tmp_path / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"two\.safetensors: "):
        read_weights(tmp_path)


def test_a_link_out_of_the_folder_is_refused_but_not_the_hubs_own(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "f00d")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/f00d"))
    assert set(read_weights(snapshot)) == {"a"}

    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").symlink_to(blobs / "f00d")
    with pytest.raises(CheckpointError, match=rf"^{other / 'model.safetensors'}: "):
        read_weights(other)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "holds no weights"),
        (("pytorch_model.bin",), "weights only as pytorch_model.bin, which can run code"),
        (("model.pt", "model.pth"), "weights only as model.pt, model.pth, which can run code"),
        (("model-00001-of-00002.safetensors",), f"without {INDEX}"),
    ],
)
def test_a_folder_without_usable_weights(tmp_path: Path, files: tuple[str, ...], said: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        weight_files(tmp_path)
    assert said in str(caught.value)
