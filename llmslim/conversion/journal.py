"""What a conversion has done, written down as it goes.

The first line says what the result depends on: the model's files, the recipe, the options and the
versions of the libraries. Each further line is a piece that is on the disk, with the digest of each
of its tensors. A line counts once it is whole: what a kill cut short, or what is not as it should
be, is forgotten with all that follows it. Names in it are looked up and never opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import safetensors
import torch
import transformers

from llmslim.checkpoint import input_files, versions, what_changed
from llmslim.data import Windows
from llmslim.errors import CheckpointError
from llmslim.recipe import recipe_yaml

from .options import Job

FORMAT = 2
_MAX_LINE = 1 << 26
_HEAD = 1 << 20
_SAMPLES, _SAMPLE = 64, 1 << 16


@dataclass(frozen=True)
class Done:
    """A piece that is finished."""

    piece: str
    digests: dict[str, str]
    """SHA-256 of its tensors, by their names in the files."""
    errors: dict[str, float | None]
    """Of its blocks, by name."""
    nonfinite: list[str]
    """Its tensors that hold NaN or infinities."""
    notes: list[str] = field(default_factory=list)
    """What its fit to calibration text has to say."""
    unseen: list[str] = field(default_factory=list)
    """Its blocks that the text never reached."""
    streams: str = ""
    """SHA-256 of the hidden states after it, where it was fitted to text."""
    sketch: list[float] = field(default_factory=list)
    """What it computes on fixed inputs, see `proof`."""

    @classmethod
    def read(cls, data: Any) -> Done | None:
        """Return what a line holds, None where it is something else."""
        try:
            done = cls(**data)
            good = (
                isinstance(done.piece, str)
                and all(type(v) is str and len(v) == 64 for v in done.digests.values())
                and all(v is None or type(v) is float for v in done.errors.values())
                and all(type(v) is float for v in done.sketch)
                and all(
                    type(v) is str and v.isprintable()
                    for v in (*done.nonfinite, *done.notes, *done.unseen, done.streams)
                )
            )
        except (TypeError, AttributeError):
            return None
        return done if good else None


class Journal:
    """The journal of one conversion.

    Args:
        path: its file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, Done] = {}
        self._file: IO[bytes] | None = None

    def begin(self, key: Mapping[str, str]) -> None:
        """Start anew.

        Args:
            key: what the result depends on.
        """
        with suppress(FileNotFoundError):
            self.path.unlink()
        self._open()
        self._append({"format": FORMAT, "key": dict(key)})

    def resume(self, key: Mapping[str, str]) -> None:
        """Read what is done.

        Args:
            key: what the result depends on now.

        Raises:
            CheckpointError: if that is not what was begun.
        """
        lines, end = self._read()
        begun = lines[0].get("key") if lines and lines[0].get("format") == FORMAT else None
        if not isinstance(begun, dict):
            self.begin(key)  # killed before the first line was whole
            return
        changed = what_changed(begun, key)
        if changed:
            raise CheckpointError(
                f"{self.path.parent}: another conversion was begun here; {changed}. Resume with "
                "the same model, recipe and options, or begin anew (--overwrite)."
            )
        self.done = {}
        for line in lines[1:]:
            done = Done.read(line)
            if done is not None:
                self.done[done.piece] = done
        self._open()
        assert self._file is not None
        self._file.truncate(end)

    def is_finished(self, key: Mapping[str, str]) -> bool:
        """Return whether all was written, and what remained was to put it in its place.

        Args:
            key: what the result depends on now, in parts at least; where one differs, that is
                not finished.
        """
        lines, _ = self._read()
        if not lines or lines[-1] != {"finished": True}:
            return False
        begun = lines[0].get("key")
        return isinstance(begun, dict) and key.items() <= begun.items()

    def add(self, done: Done) -> None:
        """Note a piece whose tensors are on the disk."""
        self._append(asdict(done))
        self.done[done.piece] = done

    def finish(self) -> None:
        """Note that all is written."""
        self._append({"finished": True})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        self._file = os.fdopen(os.open(self.path, flags, 0o644), "ab")

    def _append(self, data: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(data).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """Return the whole lines, and where the last of them ends."""
        lines: list[dict[str, Any]] = []
        end = 0
        try:
            flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)
            with os.fdopen(os.open(self.path, flags), "rb") as file:
                while text := file.readline(_MAX_LINE):
                    line = json.loads(text) if text.endswith(b"\n") else None
                    if not isinstance(line, dict):
                        break
                    lines.append(line)
                    end += len(text)
        except (OSError, ValueError, RecursionError):
            pass  # as far as it could be read
        return lines, end


def key_of(job: Job, text: Windows | None = None) -> dict[str, str]:
    """Return what the result of a conversion depends on, part by part.

    A file of weights goes by its size, the time of its last change, its header and samples of its
    content, since reading all of it would take as long as the conversion; a small file by its
    content. `allow_nonfinite` changes no byte of the weights and may be added later.

    Args:
        job: the conversion.
        text: what it fits to, once that is read.
    """
    assert job.source.path is not None
    key = {
        "the model": job.source.given,
        "the recipe": recipe_yaml(job.recipe),
        "--init": str(job.init),
        "--dtype": str(job.dtype),
        "--seed": str(job.seed),
        "--max-shard-size": str(job.max_shard_size),
        "--calibration": ", ".join(job.calibration) or "None",
        "--calibration-tokens": str(job.calibration_tokens),
        **versions(torch, transformers, safetensors),
    }
    for path in input_files(job.source):
        about = path.stat()
        parts = [str(about.st_size), _content(path, about.st_size)]
        if path.suffix == ".safetensors":
            parts.append(str(about.st_mtime_ns))
        key[f"the file {path.name}"] = " ".join(parts)
    if text is not None:
        key["--device"] = str(job.device)
        digest = hashlib.sha256()
        for ids in (text.ids, text.held_out):
            digest.update(f"{tuple(ids.shape)}".encode() + ids.contiguous().numpy().tobytes())
        key["the calibration text"] = digest.hexdigest()
    return key


def _content(path: Path, size: int) -> str:
    """Return the SHA-256 of a file's beginning and, of weights, of samples spread over the rest."""
    with path.open("rb") as file:
        content = file.read(_HEAD)
        if path.suffix != ".safetensors":
            return hashlib.sha256(content).hexdigest()
        start = 8 + int.from_bytes(content[:8], "little")
        digest = hashlib.sha256(content[:start])
        for sample in range(_SAMPLES):
            file.seek(start + max(0, size - start - _SAMPLE) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
