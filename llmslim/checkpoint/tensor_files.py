"""Write tensors at their places in the files of a checkpoint, beside the work that makes them.

One thread writes while the caller computes what comes next; no more than one batch waits. Every
tensor's digest is taken from the memory that was handed over. Once a batch is on the disk, the
caller is told its digests; `read_back` reads all files again and holds them against these.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from llmslim.errors import CheckpointError

from .layout import Layout

_CHUNK = 1 << 23


class TensorFiles:
    """The weight files of a checkpoint, open for writing.

    Args:
        folder: where they are.
        layout: what they hold.
        written: told the digests of a batch's tensors by name, once they are on the disk; runs in
            the writing thread.
    """

    def __init__(
        self, folder: Path, layout: Layout, written: Callable[[str, dict[str, str]], None]
    ) -> None:
        self._folder, self._layout, self._written = folder, layout, written
        self._files: dict[str, int] = {}
        self._thread = ThreadPoolExecutor(1, "llmslim-write")
        self._busy: Future[None] | None = None

    def __enter__(self) -> Self:
        """Open the files; those that are not there yet get their header and their size."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        for name, header in self._layout.headers.items():
            self._files[name] = file = os.open(self._folder / name, flags, 0o644)
            if not is_begun(self._folder / name, self._layout):
                os.ftruncate(file, self._layout.sizes[name])
                _write(file, memoryview(header), 0)
                os.fsync(file)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the thread and close the files."""
        self._thread.shutdown(cancel_futures=error is not None)
        for file in self._files.values():
            os.close(file)

    def put(self, batch: str, tensors: Mapping[str, Tensor]) -> None:
        """Hand over tensors; waits where those handed over before are not written yet.

        Args:
            batch: a name for them all.
            tensors: by name; they must not change any more.

        Raises:
            CheckpointError: if one is not of the shape and type that the layout has.
            OSError: if the ones before could not be written.
        """
        for name, tensor in tensors.items():
            span = self._layout.spans[name]
            if (tuple(tensor.shape), tensor.dtype) != (span.shape, span.dtype):
                raise CheckpointError(
                    f"{name}: made as {tensor.dtype} of shape {list(tensor.shape)}; the checkpoint "
                    f"has a place for {span.dtype} of shape {list(span.shape)}."
                )
        self.wait()
        self._busy = self._thread.submit(self._write_batch, batch, dict(tensors))

    def wait(self) -> None:
        """Wait until all that was handed over is on the disk.

        Raises:
            OSError: if it cannot be written.
        """
        if self._busy is not None:
            self._busy.result()
            self._busy = None

    def _write_batch(self, batch: str, tensors: dict[str, Tensor]) -> None:
        digests, touched = {}, set()
        for name in list(tensors):
            span = self._layout.spans[name]
            data = _bytes_of(tensors.pop(name))
            _write(self._files[span.file], data, span.start)
            digests[name] = hashlib.sha256(data).hexdigest()
            touched.add(span.file)
        for file in touched:
            os.fsync(self._files[file])
        self._written(batch, digests)


def is_begun(path: Path, layout: Layout) -> bool:
    """Return whether a weight file is there with the size and the header it is to have."""
    header = layout.headers[path.name]
    try:
        with path.open("rb") as file:
            return path.stat().st_size == layout.sizes[path.name] and (
                file.read(len(header)) == header
            )
    except OSError:
        return False


def read_back(folder: Path, layout: Layout, digests: Mapping[str, str]) -> dict[Path, str]:
    """Read all weight files and compare every tensor with what was handed over.

    Args:
        folder: where they are.
        layout: what they hold.
        digests: SHA-256 of every tensor, by name.

    Returns:
        SHA-256 of every file.

    Raises:
        CheckpointError: if a header or a tensor differs.
    """
    with FileHashes() as whole:
        for name in layout.sizes:
            whole.start(folder / name)
            if not is_begun(folder / name, layout):
                raise CheckpointError(f"{name}: its header is not what was written.")
        for name, span in layout.spans.items():
            if _digest(folder / span.file, span.start, span.stop) != digests.get(name):
                raise CheckpointError(
                    f"{span.file}: {name} reads back differently from what was written. Check the "
                    "disk and run again."
                )
        return {folder / name: whole.of(folder / name) for name in layout.sizes}


class FileHashes:
    """SHA-256 of files, taken by a thread beside other work."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "llmslim-hash")
        self._found: dict[Path, Future[str]] = {}
        self._stop = Event()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the thread, in the middle of a file if need be."""
        self._stop.set()
        self._thread.shutdown(cancel_futures=True)

    def start(self, path: Path) -> None:
        """Take a file's hash as soon as there is time, once."""
        if path not in self._found:
            self._found[path] = self._thread.submit(_digest, path, stopped=self._stop)

    def of(self, path: Path) -> str:
        """Return a file's hash, in hexadecimal; waits for it."""
        self.start(path)
        return self._found[path].result()


def _digest(
    path: Path, start: int = 0, stop: int | None = None, *, stopped: Event | None = None
) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        left = (path.stat().st_size if stop is None else stop) - start
        file.seek(start)
        while left > 0 and (chunk := file.read(min(left, _CHUNK))):
            if stopped is not None and stopped.is_set():
                break
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a tensor; a copy only where its elements do not lie end to end."""
    flat = tensor.detach().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write(file: int, data: memoryview, start: int) -> None:
    os.lseek(file, start, os.SEEK_SET)
    while data:
        data = data[os.write(file, data[:_CHUNK]) :]
