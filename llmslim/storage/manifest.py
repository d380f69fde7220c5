"""What a checkpoint is made of, written down, and checked again later.

`llmslim_manifest.json` names every file of the checkpoint with its size and SHA-256, and the
files of the model it was made from. No times, no absolute paths: the same input gives the same
bytes. It finds damage and accidents; who can change a file can change the manifest too, so
it proves no origin.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

from llmslim._version import __version__
from llmslim.atomic import all_files
from llmslim.errors import CheckpointError
from llmslim.modeling.configuration_llmslim import MODEL_TYPE

from .companions import PROCESSORS, TEMPLATES
from .safetensors_io import INDEX, read_json, read_weights, weight_files
from .source import Source, empty_model, open_source

FORMAT = 1
MANIFEST = "llmslim_manifest.json"
EVALUATION = "llmslim_evaluation.json"
"""Scores of the checkpoint, which come after it and are no part of it."""
BENCHMARK = "llmslim_benchmark.json"
"""Its speeds, likewise."""
_CHUNK = 1 << 23

_INPUTS = (
    *("config.json", "generation_config.json", "tokenizer*", "*.model", "vocab.*", INDEX),
    *(*PROCESSORS, *TEMPLATES),
)


@dataclass(frozen=True)
class Verification:
    """What comparing a checkpoint with its manifest found."""

    path: Path
    files: int
    """Number of files that the manifest names."""
    problems: tuple[str, ...]
    """A sentence for each difference."""

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.problems


def write_manifest(
    folder: Path, *, source: Source | None = None, known: Mapping[Path, str] | None = None
) -> Path:
    """Write the manifest of a checkpoint.

    Args:
        folder: the checkpoint, complete but for the manifest.
        source: the model it was made from; its files are listed as well.
        known: SHA-256 of files that need not be read again.

    Returns:
        The manifest's path.
    """
    data = {
        "format": FORMAT,
        "llmslim": __version__,
        "files": _describe(folder, all_files(folder, MANIFEST, EVALUATION, BENCHMARK), known or {}),
        "source": None
        if source is None or source.path is None
        else {
            "model": source.name,
            "files": _describe(source.path, input_files(source), known or {}),
        },
    }
    path = folder / MANIFEST
    path.write_text(_text(data), encoding="utf-8")
    return path


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2, sort_keys=True) + "\n"


def relisted(folder: Path, name: str, content: bytes) -> bytes:
    """Return a checkpoint's manifest as it is once a file has another content."""
    data = read_json(folder / MANIFEST)
    data["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return _text(data).encode()


def verify_folder(path: Path) -> Verification:
    """Compare a checkpoint with its manifest, and its weights with what its config needs.

    Files and folders whose names begin with a dot are not part of a checkpoint: git and the hub
    put theirs beside it.

    Args:
        path: a folder that `write_checkpoint` wrote.

    Raises:
        CheckpointError: if there is no such folder or no manifest to compare with.
    """
    path = Path(path)
    if not os.path.isfile(path / MANIFEST):  # noqa: PTH113  (Path's raises on names too long)
        raise CheckpointError(
            f"{path}: has no {MANIFEST}; only a checkpoint that llmslim wrote can be verified."
        )
    manifest = read_json(path / MANIFEST)
    listed = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(listed, dict):
        raise CheckpointError(
            f"{path / MANIFEST}: format {manifest.get('format')!r}; this version reads {FORMAT}, "
            "with an object of files."
        )
    files = all_files(path, MANIFEST, EVALUATION, BENCHMARK)
    found = {file.relative_to(path).as_posix(): file for file in files}
    problems = [f"{name}: not in the manifest; it was added." for name in found.keys() - listed]
    for name, entry in listed.items():
        if name not in found:
            problems.append(f"{name}: missing.")
            continue
        size = found[name].stat().st_size
        if not isinstance(entry, dict) or entry.get("bytes") != size:
            wanted = entry.get("bytes") if isinstance(entry, dict) else entry
            problems.append(f"{name}: {size} bytes; {wanted} were written.")
        elif entry.get("sha256") != file_sha256(found[name]):
            problems.append(f"{name}: changed; its SHA-256 is not the one written.")
    return Verification(path, len(listed), (*sorted(problems), *weight_problems(path)))


def weight_problems(folder: Path) -> list[str]:
    """Return how the weights in the files differ from those that the slim config's model needs."""
    try:
        if read_json(folder / "config.json").get("model_type") != MODEL_TYPE:
            return []  # base classes may store other names than they use
        model = empty_model(open_source(folder).config, f"{folder / 'config.json'}")
        entries = read_weights(folder)
    except CheckpointError as error:
        return list(error.problems)
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    return [
        *(
            f"{n}: a weight that the model needs is missing."
            for n in sorted(needed.keys() - entries - tied)
        ),
        *(f"{n}: a weight that the model does not have." for n in sorted(entries.keys() - needed)),
        *(
            f"{n}: a weight of shape {list(entries[n].shape)}; the model needs {list(needed[n])}."
            for n in sorted(entries.keys() & needed.keys())
            if entries[n].shape != needed[n]
        ),
    ]


def input_files(source: Source) -> list[Path]:
    """Return the files of a model that a manifest names."""
    assert source.path is not None
    if source.gguf_file is not None:
        return [source.path / source.gguf_file]
    small = {path for pattern in _INPUTS for path in source.path.glob(pattern) if path.is_file()}
    return sorted({*small, *(weight_files(source.path) if source.has_weights else ())})


def _describe(folder: Path, files: Iterable[Path], known: Mapping[Path, str]) -> dict[str, Any]:
    return {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": known.get(file) or file_sha256(file),
        }
        for file in files
    }


def file_sha256(path: Path, stopped: Event | None = None) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Args:
        path: the file.
        stopped: once this is set, there is no need to read on.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while (chunk := file.read(_CHUNK)) and not (stopped and stopped.is_set()):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def hashing() -> Iterator[Callable[[Path], Future[str]]]:
    """Yield a function that starts to hash a file beside other work, once for each file."""
    stopped = Event()
    with ThreadPoolExecutor(1, "llmslim-hash") as thread:
        try:
            yield cache(lambda path: thread.submit(file_sha256, path, stopped))
        finally:  # in the middle of a file if need be
            stopped.set()
            thread.shutdown(cancel_futures=True)
