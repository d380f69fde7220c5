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
from test_checkpoint_shards import b, raw

from llmslim.storage import open_source
from llmslim.storage.safetensors_io import INDEX, read_header, read_json, read_weights


def test_a_header_that_takes_long_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    start = time.monotonic()
    path.write_bytes(raw(b(shape=[9] * 1_000_000)))
    assert "overflow" in refused(read_header, path)
    with path.open("wb") as file:  # sparse: takes no room
        file.write(struct.pack("<Q", 100_000_000))
        file.truncate(8 + 100_000_000)
    assert "JSON" in refused(read_header, path)
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
