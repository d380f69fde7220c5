"""Fit to calibration text with one decoder layer in memory at a time.

The walk (`fitting.fit_sequentially`) is the one that fits a model in memory; here each layer is
brought in from the files with its dense weights, and the finished one is handed over to be written.

After each layer both streams of hidden states go to a file of the working folder, and are used
from there, memory-mapped. So an interrupted conversion continues at once: nothing runs twice. The
files of the last two layers stay; the record of a layer has the digest of its file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from llmslim import editing
from llmslim.anatomy.sites import Layers, find_layers
from llmslim.editing.plans import Plan
from llmslim.fitting.layer_store import Fitted, LayerStore, Streams
from llmslim.storage import NotInPiecesError, Piece, Pieces

from .calibrate import overflow_note
from .finished import PieceRecord

_ALIGNED = 64
"""What the address of a window is a multiple of, as a new tensor's is: sums depend on it."""

Finished = Callable[[Piece, Fitted, str], None]
"""Takes a finished layer, what its fit did, and the digest of the streams after it."""


class LayersOnDisk(LayerStore):
    """LayerStore to a model on the meta device, whose layers come from its files.

    Args:
        pieces: the model.
        plan: what is done to it.
        streams: folder for hidden states.
        done: pieces that are finished; those that must be fitted again are taken out.
        finished: takes up each layer; once it returns, the layer before it is on the disk.
    """

    def __init__(
        self,
        pieces: Pieces,
        plan: Plan,
        streams: Path,
        done: dict[str, PieceRecord],
        finished: Finished,
    ) -> None:
        self._pieces, self._plan, self._finished = pieces, plan, finished
        self._layers = find_layers(pieces.model)
        self._files = _StreamFiles(streams, pieces.device)
        self._first = self._first_to_fit(done)
        self._overflowed = False

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Load what runs before the decoder layers, and the first of these."""
        first = [p for p in self._pieces.all if self._layers.index_of(p.name) in (None, 0)]
        for piece in first:
            self._pieces.load(piece)
        yield
        for piece in first:
            self._pieces.release(piece)

    def resume(self, streams: Streams) -> tuple[int, Streams]:
        """Return the first layer that is not finished, and the streams before it."""
        if self._first:
            streams = self._read(self._first - 1, streams)
        return self._first, streams

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Load a decoder layer with its dense weights."""
        piece = self._piece(index)
        self._pieces.load(piece)
        for mlp in self._plan.mlps:
            if not mlp.fitted and self._pieces.piece_of(mlp.mlp.down) is piece:
                editing.resize_mlp(self._pieces.model, mlp.mlp, mlp.width)
        yield
        self._pieces.release(piece)

    def finished(self, index: int, fitted: Fitted, streams: Streams) -> Streams:
        """Write the streams after a layer, and hand the layer over."""
        fitted.notes += self._overflow_notes(streams)
        digest = self._files.write(index, streams)
        self._finished(self._piece(index), fitted, digest)
        self._files.remove(index - 2)  # the layer after that one is on the disk
        return self._read(index, streams)

    def _read(self, index: int, like: Streams) -> Streams:
        """Return the streams after a layer, of windows like those of another's."""
        return self._files.read(index, like.dense[0], len(like.dense) - len(like.slim))

    def _overflow_notes(self, streams: Streams) -> list[str]:
        """Return one note where the dense stream, kept in float32, is too large for float16."""
        dtype = self._pieces.model.dtype
        if self._overflowed or dtype != torch.float16:
            return []
        most = torch.finfo(dtype).max
        self._overflowed = any(bool((window.abs() > most).any()) for window in streams.dense)
        note = overflow_note(self._pieces.source.given, "hidden states are")
        return [note] if self._overflowed else []

    def _piece(self, index: int) -> Piece:
        return self._pieces.piece_of(f"{self._layers.path}.{index}")

    def _first_to_fit(self, done: dict[str, PieceRecord]) -> int:
        """Return the index of the first layer still to be fitted."""
        names = [self._piece(index).name for index in range(self._layers.count)]
        first = next((n for n, name in enumerate(names) if name not in done), len(names))
        while first and not self._files.holds(first - 1, done[names[first - 1]].streams):
            first -= 1
        for name in names[first:]:
            done.pop(name, None)
        return first


def check_layers(pieces: Pieces) -> None:
    """Refuse a model whose decoder layers cannot be brought in, and run, one by one.

    Raises:
        NotInPiecesError: if they share weights with each other, or with something outside.
    """
    layers: Layers = find_layers(pieces.model)
    for index in range(layers.count):
        name = f"{layers.path}.{index}"
        if pieces.piece_of(name).modules != (name,):
            raise NotInPiecesError(f"{name} cannot be loaded by itself")
    pieces.make_tables()


class _StreamFiles:
    """Hidden states after decoder layers, a file for each.

    Args:
        folder: where they are; made where it is not there.
        device: where they are used; on the processor, as they lie on the disk.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device
        folder.mkdir(exist_ok=True)

    def write(self, index: int, streams: Streams) -> str:
        """Bring streams to the disk; return their SHA-256."""
        self.remove(index)
        digest = hashlib.sha256()
        with self._path(index).open("xb") as file:
            for window in (*streams.dense, *streams.slim):
                data = window.contiguous().cpu().numpy().tobytes()
                data += bytes(-len(data) % _ALIGNED)
                file.write(data)
                digest.update(data)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def read(self, index: int, like: Tensor, more: int) -> Streams:
        """Return streams; on the processor, memory-mapped.

        Args:
            index: of the layer they come out of.
            like: a window of the same shape and type.
            more: how many windows more the dense stream has than the slim one.
        """
        values, size, path = like.numel(), like.element_size(), self._path(index)
        room = values + -values % (_ALIGNED // size)
        flat = torch.from_file(str(path), size=path.stat().st_size // size, dtype=like.dtype)
        windows = [part[:values].view(like.shape).to(self._device) for part in flat.split(room)]
        dense = (len(windows) + more) // 2
        return Streams(windows[:dense], windows[dense:])

    def holds(self, index: int, digest: str) -> bool:
        """Return whether streams are there as they were written."""
        try:
            with self._path(index).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError:
            return False

    def remove(self, index: int) -> None:
        """Remove streams, if they are there."""
        self._path(index).unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        return self._folder / f"after-{index}"
