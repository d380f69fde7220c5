"""The finished pieces of a conversion: files of weights, and a record of each piece.

    checkpoint/model-00002-of-00007.safetensors    as it will be
    records/00001.json                             what else is to be known of the piece

A thread writes a piece while the next one is made. Each file is written under another name, and
brought to the disk; then comes the record, and then the files are renamed: a piece is finished when
its record and its files are there. All else, whatever a kill cut short, is thrown away, and the
piece made again. At the end each file is read back and compared with what was handed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

from torch import Tensor

from llmslim.errors import CheckpointError
from llmslim.storage import (
    file_sha256,
    flush,
    read_json_if_whole,
    remove,
    write_tensors,
    write_whole,
)

from .target_model import TargetModel


@dataclass(frozen=True)
class PieceRecord:
    """What is to be known of a finished piece beside its weights."""

    piece: str
    errors: dict[str, float | None]
    """Of its blocks, by name."""
    nonfinite: list[str]
    """Its tensors that hold NaN or infinities."""
    notes: list[str] = field(default_factory=list)
    """Of its fit to calibration text."""
    unseen: list[str] = field(default_factory=list)
    """Its blocks that the text never reached."""
    streams: str = ""
    """SHA-256 of the hidden states after it, where it was fitted to text."""
    fingerprint: list[float] = field(default_factory=list)
    """What it computes on fixed inputs, see `proof`."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of its files, by name."""

    @classmethod
    def read(cls, path: Path) -> PieceRecord | None:
        """Return what a file holds, None where it is something else."""
        try:
            record = cls(**read_json_if_whole(path))
            good = (
                all(v is None or type(v) is float for v in record.errors.values())
                and all(type(v) is float for v in record.fingerprint)
                and all(
                    type(v) is str and v.isprintable()
                    for texts in (record.nonfinite, record.notes, record.unseen)
                    for v in (record.piece, record.streams, *texts, *record.files.values())
                )
            )
        except (TypeError, AttributeError):
            return None
        return record if good else None


class FinishedPieces:
    """The finished pieces in a working folder; a context, at the end of which all are written.

    Args:
        folder: for files of weights.
        records: for records.
        target: the model that is made.
        pieces: names of all its pieces, in order.
    """

    def __init__(
        self, folder: Path, records: Path, target: TargetModel, pieces: Sequence[str]
    ) -> None:
        self._folder, self._target = folder, target
        self._records = {piece: records / f"{n:05}.json" for n, piece in enumerate(pieces)}
        for place in (folder, records):
            place.mkdir(exist_ok=True)
        self.done: dict[str, PieceRecord] = {}
        """By piece."""
        for piece, path in self._records.items():
            found = None if path.is_symlink() else PieceRecord.read(path)
            files = [folder / file for file in target.files[piece]]
            there = all(file.is_file() and not file.is_symlink() for file in files)
            if (
                found
                and there
                and found.piece == piece
                and {*found.files} == {*target.files[piece]}
            ):
                self.done[piece] = found
        kept = [folder / file for record in self.done.values() for file in record.files]
        kept += [self._records[piece] for piece in self.done]
        for place in (folder, records):
            for path in {*place.iterdir()} - {*kept}:
                remove(path)

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread = ThreadPoolExecutor(1, "llmslim-write")
        self._busy: Future[None] | None = None
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Wait for the thread."""
        self._thread.shutdown(cancel_futures=kind is not None)

    def put(self, record: PieceRecord, tensors: dict[str, Tensor]) -> None:
        """Hand over a piece; waits where the one before is not written yet.

        Args:
            record: of the piece, but for its files.
            tensors: its tensors in the new model, by name; they must not change any more.

        Raises:
            CheckpointError: if they are not what the new model has.
            OSError: if the piece before could not be written.
        """
        files = self._target.split(record.piece, tensors)
        self.wait()
        self._busy = self._thread.submit(self._write, record, files)

    def wait(self) -> None:
        """Wait until all that was handed over is on the disk.

        Raises:
            OSError: if it cannot be written.
        """
        busy, self._busy = self._busy, None
        if busy is not None:
            busy.result()

    def hashes(self) -> dict[Path, str]:
        """Read all files and compare them with what was handed over; return their SHA-256.

        Raises:
            CheckpointError: if one differs.
        """
        found = {}
        for record in self.done.values():
            for name, digest in record.files.items():
                found[self._folder / name] = file_sha256(self._folder / name)
                if found[self._folder / name] != digest:
                    raise CheckpointError(
                        f"{name}: {record.piece} reads back differently from what was written. "
                        "Check the disk and run again."
                    )
        return found

    def _write(self, record: PieceRecord, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        paths = {self._folder / file: self._folder / f".{file}.new" for file in files}
        digests = {}
        for (path, new), tensors in zip(paths.items(), files.values(), strict=True):
            for old in (path, new):
                old.unlink(missing_ok=True)
            digests[path.name] = write_tensors(new, tensors)
        record = replace(record, files=digests)
        write_whole(self._records[record.piece], json.dumps(asdict(record)))
        for path, new in paths.items():
            new.replace(path)
        flush(self._folder)
        self.done[record.piece] = record
