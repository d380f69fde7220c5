"""Read and write safetensors files: headers, the files that make up a model, one file of tensors.

Headers are read by the safetensors library, which refuses a file that is not exactly the tensors it
describes: a download that stopped half-way, tensors that overlap. What it does not look at is
checked here: pickles and archives under another name, names that are not fit for a terminal, an
index that points elsewhere. transformers would load some of these with fresh random weights in the
gaps. Pickles are not opened at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmslim.errors import CheckpointError, printable

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""Types that weights may have, as safetensors and as torch name them."""
TORCH_TYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types that are written, by the name that safetensors gives them, in the order of a file."""

_NAMES = {dtype: name for name, dtype in TORCH_TYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}
_CHUNK = 1 << 23
_MAX_JSON = 64 << 20
"""Bytes of a JSON file that are read: the index of a model of a trillion weights takes 16 MB."""
_MAX_NAME = 1000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.npz", "*.zip")
_CONVERT = (
    "If you trust the file, load it with AutoModelForCausalLM.from_pretrained and write it back "
    "with save_pretrained."
)


class Entry(NamedTuple):
    """A tensor in a file, as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    """The file."""


def read_header(path: Path) -> dict[str, Entry]:
    """Return what a safetensors file holds, once it is known to be whole.

    Args:
        path: the file.

    Raises:
        CheckpointError: if it cannot be read, or is not exactly the tensors of its header.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found = {n: Entry(s.get_dtype(), tuple(s.get_shape()), path) for n, s in slices.items()}
    except SafetensorError as error:
        # A zip archive, which torch.save writes, or a pickle of protocol 2 or later.
        zipped = start[:4] == b"PK\x03\x04"
        if zipped or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"):
            raise CheckpointError(
                f"{path}: a {'zip archive' if zipped else 'pickle'}, not safetensors; "
                f"such files can run code when opened. {_CONVERT}"
            ) from error
        why = printable(str(error).removeprefix("Error while deserializing header: ")[:300])
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({why}). Download or copy it again."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if not all(map(_is_plain, found)):
        raise CheckpointError(
            f"{path}: names of tensors that are not printable, or longer than {_MAX_NAME}; no "
            "model has them. Download or copy it again."
        )
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, byte for byte as safetensors would, and bring it to the disk.

    It is written from where the tensors lie; no copy of them is made.

    Args:
        path: the file; must not exist.
        tensors: by name, on the processor.

    Returns:
        SHA-256 of the file, taken from the memory that it was written from.
    """
    order = sorted(tensors, key=lambda name: (_RANKS[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        about = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape)}
        header[name] = {**about, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb", buffering=0) as file:
        _write(file, memoryview(len(text).to_bytes(8, "little") + text), digest)
        for name in order:
            flat = tensors[name].detach().contiguous().reshape(-1)
            if flat.numel():
                _write(file, memoryview(flat.view(torch.uint8).numpy()), digest)  # type: ignore[arg-type]
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write(file: Any, data: memoryview, digest: Any) -> None:
    digest.update(data)
    while data:
        data = data[file.write(data[:_CHUNK]) :]


def check_types(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that cannot be written.

    Args:
        tensors: by name, on any device.

    Raises:
        CheckpointError: if there are none, or one is of a type that is not written.
    """
    unknown = {str(tensor.dtype) for tensor in tensors.values() if tensor.dtype not in _NAMES}
    if unknown or not tensors:
        raise CheckpointError(
            f"weights of type {', '.join(sorted(unknown)) or 'none'}; allowed "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in _NAMES)}."
        )


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds weights, whole or not, in any format, or an index of some."""
    kinds = ("*.safetensors", "*.index.json", "*.gguf", *_PICKLES)
    return any(any(folder.glob(kind)) for kind in kinds)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that make up a model, each inside the folder.

    Args:
        folder: holds `model.safetensors`, or an index and the shards it names.

    Raises:
        CheckpointError: if there are none, or the index cannot be trusted.
    """
    if (folder / WEIGHTS).exists():
        return [_inside(folder, WEIGHTS, folder / WEIGHTS)]
    if (folder / INDEX).exists():
        names = sorted(set(_weight_map(folder).values()))
        return [_inside(folder, name, folder / INDEX) for name in names]
    loose = sorted(path.name for path in folder.glob("*.safetensors"))
    if loose:
        raise CheckpointError(
            f"{folder}: {', '.join(loose[:3])} without {INDEX}; weights are {WEIGHTS}, or shards "
            "and their index. Download the index as well."
        )
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: weights only as {', '.join(pickles[:3])}, which can run code when opened; "
            f"only safetensors and GGUF are read. {_CONVERT}"
        )
    raise CheckpointError(f"{folder}: holds no weights; there must be {WEIGHTS} or {INDEX}.")


def read_weights(folder: Path) -> dict[str, Entry]:
    """Return every tensor of a model, all files checked.

    Args:
        folder: as for `weight_files`.

    Raises:
        CheckpointError: if a file is missing or broken, lacks a tensor that the index places
            in it, or holds one that another file holds, too.
    """
    headers: dict[str, dict[str, Entry]] = {}
    owner: dict[str, str] = {}
    for path in weight_files(folder):
        headers[path.name] = read_header(path)
        for tensor in headers[path.name]:
            if owner.setdefault(tensor, path.name) != path.name:
                raise CheckpointError(
                    f"{path}: holds {tensor}, and so does {owner[tensor]}; a tensor is in one "
                    "file. Download both again."
                )
    if not owner:
        raise CheckpointError(
            f"{folder}: its files of weights hold no tensor. Download the model again."
        )
    if not (folder / WEIGHTS).exists():
        for tensor, name in _weight_map(folder).items():
            if tensor not in headers[Path(name).name]:
                raise CheckpointError(
                    f"{folder / name}: does not hold {tensor}, which {INDEX} places there. "
                    "Download both again."
                )
    return {tensor: entry for header in headers.values() for tensor, entry in header.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: the file.

    Raises:
        CheckpointError: if the file cannot be read, is not JSON, or holds something else.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(text) > _MAX_JSON:
        raise CheckpointError(f"{path}: larger than the {_MAX_JSON:,} bytes that are read.")
    try:
        data = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({str(error).splitlines()[0]}).") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}; it must be a JSON object.")
    return data


def read_json_if_whole(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where `read_json` would raise."""
    try:
        return read_json(path)
    except CheckpointError:
        return {}


def objects_in(data: Any) -> Iterator[dict[str, Any]]:
    """Yield a JSON object and every object inside it, in lists too."""
    todo = [data]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            yield item
            todo += item.values()
        elif isinstance(item, list):
            todo += item


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether a path, once every link is followed, lies below `folder`.

    The hub's cache is one place with its folders: there, files are links to blobs beside them.
    """
    home = folder.resolve()
    allowed = [home]
    snapshot = hub_snapshot(home)
    if snapshot is not None:
        allowed.append(snapshot.parents[1] / "blobs")
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return False
    return any(root in real.parents for root in allowed)


def hub_snapshot(folder: Path) -> Path | None:
    """Return the snapshot in the hub's cache that a folder is, or is in; None for others.

    Args:
        folder: without links; the cache has `models--OWNER--NAME/snapshots/REVISION`.
    """
    for place in (folder, *folder.parents):
        if place.parent.name == "snapshots":
            inside = place == folder or place.parents[1].name.startswith("models--")
            return place if inside else None
    return None


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{path}: has no weight_map of tensor names to files.")
    if not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{path}: its weight_map holds something else than file names.")
    if not all(map(_is_plain, names)):
        raise CheckpointError(f"{path}: its weight_map names tensors in unprintable characters.")
    return names


def _is_plain(name: str) -> bool:
    return name.isprintable() and len(name) <= _MAX_NAME


def _inside(folder: Path, name: str, where: Path) -> Path:
    """Return a weight file of `folder`.

    Raises:
        CheckpointError: if it is not there, or is not a plain file inside the folder.
    """
    path = folder / name
    plain = _is_plain(name) and len(name.encode()) <= 255 and PurePath(name).name == name
    if not plain or not is_inside(path, folder):
        raise CheckpointError(
            f"{where}: names {name[:300]!r}, which is outside {folder}; weights must be plain "
            "files inside it. Copy them there."
        )
    if not path.is_file():
        raise CheckpointError(f"{folder}: {name} is missing; {where.name} names it. Download it.")
    return path
