"""Look into the safetensors files of a folder before anything is loaded from them.

A file is eight bytes of header length, a JSON header, then the tensors end to end. Everything
about it can be checked against the file's size without reading a single weight: a download that
stopped half-way, an index that points elsewhere, an archive made to deceive. transformers would
load some of these with fresh random weights in the gaps.

What a file may make this reader do is bounded: sizes, dimensions and names have limits that no
real model comes near. What passes here, the safetensors library reads the same way: each key is
given once, and numbers and text are such as both can hold.

Nothing here reads tensor data, and pickles are not opened at all.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from llmslim.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""Types that weights may have, as safetensors and as torch name them."""

_MAX_HEADER = 16 << 20
"""A hundred thousand tensors take 12 MB. The format's 100 MB would take gigabytes to parse."""
_MAX_JSON = 64 << 20
"""The same for other JSON files: the index of a model of a trillion weights takes 16 MB."""
_MAX_DIMENSIONS = 32
_MAX_NAME = 1000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.npz", "*.zip")
_CONVERT = (
    "If you trust the file, load it with AutoModelForCausalLM.from_pretrained and write it back "
    "with save_pretrained."
)
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


class Entry(NamedTuple):
    """What a header says about one tensor."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Entry]:
    """Return what a safetensors file holds, once it is known to be whole.

    Args:
        path: the file.

    Raises:
        CheckpointError: if the header cannot be read, or the file is not exactly the tensors
            that the header describes.
    """
    again = "Download or copy the file again."
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = file.read(length) if length <= min(size - 8, _MAX_HEADER) else None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    # A zip archive, which torch.save writes, or a pickle of protocol 2 or later. A header of 640
    # bytes begins as a pickle does, but with JSON after its length.
    pickle = start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"
    if start[:4] == b"PK\x03\x04" or (pickle and (text is None or text[:1] != b"{")):
        raise CheckpointError(
            f"{path}: a {'zip archive' if start[:1] == b'P' else 'pickle'}, not safetensors; "
            f"such files can run code when opened. {_CONVERT}"
        )
    if text is None and length <= size - 8:
        raise CheckpointError(
            f"{path}: a header of {length:,} bytes; at most {_MAX_HEADER:,} are read."
        )
    if text is None:
        raise CheckpointError(
            f"{path}: a header of {length:,} bytes in a file of {size:,}; not a whole safetensors "
            f"file. {again}"
        )
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except _RepeatedKeyError as error:
        raise CheckpointError(f"{path}: its header gives {error} twice. {again}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not JSON. {again}") from error
    malformed = CheckpointError(
        f"{path}: its header does not give every tensor a known dtype, a shape and two "
        f"data_offsets. {again}"
    )
    entries, spans = {}, []
    try:
        about = header.pop("__metadata__", {})
        if not all(type(value) is str for value in about.values()):
            raise malformed
        "".join((*about, *about.values())).encode("utf-8")  # half a surrogate pair has no bytes
        for name, given in header.items():
            if len(given) != 3 or type(given["shape"]) is not list:
                raise malformed
            start, stop = given["data_offsets"]
            entries[name] = entry = Entry(given["dtype"], tuple(given["shape"]))
            spans.append((start, stop, _BITS[entry.dtype], name))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise malformed from error
    numbers = (n for *span, _, name in spans for n in (*span, *entries[name].shape))
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise malformed
    # Names go into messages, and so to terminals; a product of many numbers has no end.
    shapes = (entry.shape for entry in entries.values())
    if not all(len(s) <= _MAX_DIMENSIONS and prod(n or 1 for n in s) < 1 << 63 for s in shapes):
        raise malformed
    if not all(map(_is_plain, entries)):
        raise malformed
    end = 0
    for start, stop, bits, name in sorted(spans):
        if start != end:
            how = "overlaps the tensor before it" if start < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: {name} {how}; tensors must lie end to end. {again}")
        shape = entries[name].shape
        if (stop - start) * 8 != prod(shape) * bits:
            raise CheckpointError(
                f"{path}: {name} has data_offsets {start} to {stop}; {entries[name].dtype} of "
                f"shape {list(shape)} takes another number of bytes. {again}"
            )
        end = stop
    if end != size - 8 - length:
        raise CheckpointError(
            f"{path}: {size:,} bytes; its header describes {8 + length + end:,}. {again}"
        )
    return entries


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
        CheckpointError: if a file is missing or broken, does not hold a tensor that the index says
            it does, or holds one that another file holds, too.
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
                    f"{folder / name}: does not hold {tensor}, which {INDEX} says it does. "
                    "Download both again."
                )
    return {tensor: entry for header in headers.values() for tensor, entry in header.items()}


def read_json(path: Path, *, once: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: the file.
        once: whether a key that an object has twice is an error; else the last one holds.

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
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_once if once else None)
    except _RepeatedKeyError as error:
        raise CheckpointError(f"{path}: gives {error} twice. Keep one.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({str(error).splitlines()[0]}).") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}; it must be a JSON object.")
    return data


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
    names = read_json(path, once=True).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{path}: has no weight_map of tensor names to files.")
    if not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{path}: its weight_map holds something else than file names.")
    if not all(map(_is_plain, names)):
        raise CheckpointError(f"{path}: its weight_map names tensors in unprintable characters.")
    return names


class _RepeatedKeyError(ValueError):
    """A key that stands twice in one object: two readers may each take another one."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of the pairs of a JSON object.

    Raises:
        _RepeatedKeyError: if it has a key twice.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _RepeatedKeyError(repr(name)[:80])
        found[name] = value
    return found


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
