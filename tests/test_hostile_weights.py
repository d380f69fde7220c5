"""Files of weights made to deceive: what two readers could read differently, pickles, archives."""

from __future__ import annotations

import io
import json
import pickle
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import refused
from safetensors.torch import save_file
from test_checkpoint_shards import GOOD, b, raw

from llmslim.checkpoint import open_source
from llmslim.checkpoint.safetensors_io import INDEX, read_header, read_json, read_weights

# --------------------------------------------------------------------------- safetensors headers


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (
            b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
            b'"a":{"dtype":"U8","shape":[24],"data_offsets":[0,24]}}',
            "its header gives 'a' twice",
        ),
        (b'{"a":{"dtype":"U8","dtype":"I8","shape":[24],"data_offsets":[0,24]}}', "'dtype' twice"),
        ({**GOOD, "__metadata__": ["pt"]}, "does not give every tensor"),
        ({**GOOD, "__metadata__": {"format": 1}}, "does not give every tensor"),
        ({**GOOD, "__metadata__": {"format": "\ud800"}}, "does not give every tensor"),
        ({**GOOD, "__metadata__": {"\udfff": "pt"}}, "does not give every tensor"),
        (b(shape="", data_offsets=[16, 18]), "does not give every tensor"),
        (b(shape={}, data_offsets=[16, 18]), "does not give every tensor"),
        (b(more=1), "does not give every tensor"),
        (b(data_offsets=[-8, 0]), "does not give every tensor"),
        (b(shape=[0, 1 << 62, 1 << 62], data_offsets=[16, 16]), "does not give every tensor"),
        (b(shape=[1 << 64, 0], data_offsets=[16, 16]), "does not give every tensor"),
        (b(shape=[1] * 33), "does not give every tensor"),
        ({"a": GOOD["a"], "\x1b[2J": GOOD["b"]}, "does not give every tensor"),
        ({"a": GOOD["a"], "\ud800": GOOD["b"]}, "does not give every tensor"),
        ({"a": GOOD["a"], "b" * 1001: GOOD["b"]}, "does not give every tensor"),
        (json.dumps(GOOD).encode("utf-16"), "header is not JSON"),
        (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "header is not JSON"),
    ],
)
def test_a_header_that_two_readers_could_read_differently(
    tmp_path: Path, header: Any, said: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(header))
    assert said in refused(read_header, path)


def test_a_hundred_megabytes_of_header_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:  # sparse: takes no room
        file.write(struct.pack("<Q", 100_000_000))
        file.truncate(8 + 100_000_000)
    assert "a header of 100,000,000 bytes; at most 16,777,216" in refused(read_header, path)


def test_a_product_of_a_million_sizes_is_not_worked_out(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(b(shape=[9] * 1_000_000)))
    start = time.monotonic()
    assert "does not give every tensor" in refused(read_header, path)
    assert time.monotonic() - start < 5


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    said = refused(read_weights, tmp_path)
    assert "two.safetensors: holds b, and so does one.safetensors" in said


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (r'{"weight_map": {"a": "x\u0000y"}}', "outside"),
        (r'{"weight_map": {"a": "\ud800"}}', "outside"),
        (f'{{"weight_map": {{"a": "{"é" * 200}"}}}}', "outside"),
        ('{"weight_map": {"a": "loop.safetensors"}}', "outside"),
        (r'{"weight_map": {"\u001b[2J": "one.safetensors"}}', "unprintable"),
        ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "gives 'a' twice"),
    ],
)
def test_an_index_with_names_that_no_file_has(tmp_path: Path, index: str, said: str) -> None:
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / INDEX).write_text(index)
    assert said in refused(read_weights, tmp_path)


def test_a_json_file_without_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / INDEX
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert "larger than the 67,108,864 bytes that are read" in refused(read_json, path)


# --------------------------------------------------------------------------- pickles and archives


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('this must not run')",)


def _archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(_Bomb()))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"), [(_archive(), "a zip archive"), (pickle.dumps(_Bomb()), "a pickle")]
)
def test_a_pickle_in_disguise_is_not_opened(folder: Path, content: bytes, said: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    message = refused(open_source, folder)
    assert f"model.safetensors: {said}, not safetensors" in message
    assert "write it back with save_pretrained" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pkl", "weights.zip", "model.npz"])
def test_pickles_alone_are_refused_with_how_to_convert(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(_archive())
    message = refused(open_source, folder)
    assert f"weights only as {name}" in message
    assert "write it back with save_pretrained" in message
