"""Tokenise a source into one file, once; read it through the operating system's memory map.

The file is safetensors: `ids`, all documents one after the other (int32, tokens without loss as
~id, see prompts.py); `lengths`, one for each document; and `identities`, by which two that say the
same are known. It grows on disk while the source is
read, so that neither text nor tokens are ever held as a whole, and takes its name only when it is
complete. Its name is a hash of everything that it depends on: the source's content, the tokenizer,
the template. Where no cache can be written it is a temporary file that goes with the object.

Documents are numbered in the source's order; one that is empty or not asked for has length 0.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import secrets
import shutil
import struct
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from llmslim.errors import DataError
from llmslim.progress import Progress

from .columns import characters, check_left, identity
from .messages import Document
from .prompts import Encoder, Ids
from .sampling import cache_folder
from .sources import Source

_FORMAT = 3  # raised by whoever changes what is in the file
_HEADER_BYTES = 2**16  # written last, when the sizes are known; the space for it comes first
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 1024, 2**22


@dataclass(eq=False)
class Tokens:
    """The documents of a source as ids."""

    ids: Ids
    """All documents, one after the other; on disk."""
    lengths: NDArray[np.int64]
    """Tokens of each document."""
    starts: NDArray[np.int64]
    """Where in `ids` each document begins."""
    licences: tuple[str, ...] = ()
    """What the rows themselves say their licence is."""
    notes: tuple[str, ...] = ()
    """Sentences about what turned out otherwise than asked for."""
    identities: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """The same number for documents that say the same; 0 for one of no length."""


def tokenise(
    source: Source,
    encoder: Encoder,
    *,
    cache: Path | None = None,
    wanted: NDArray[np.bool_] | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Tokens:
    """Return a source's documents as ids, from the cache if they are there.

    Args:
        source: what to read.
        encoder: turns documents into ids.
        cache: folder to keep the file in; one in the user's cache if not given.
        wanted: which documents are needed; all if not given.
        limit: stop when there are so many tokens.
        progress: called with documents done, documents in all (as far as known), `tokenising`.

    Raises:
        DataError: if the source cannot be read, or the file not be written.
    """
    chosen = "all" if wanted is None else hashlib.sha256(wanted.tobytes()).hexdigest()
    about = [_FORMAT, source.key, encoder.key, _tokenizer_key(encoder.tokenizer), chosen, limit]
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32] + ".safetensors"
    folder = _writable(cache or cache_folder().with_name("tokens"))
    if folder is not None:
        kept = _read(folder / name)
        if kept is None:
            _write(folder / name, source, encoder, wanted, limit, progress)
            kept = _read(folder / name)
        assert kept is not None
        return kept
    passing = Path(tempfile.mkdtemp(prefix="llmslim-"))
    try:
        _write(passing / name, source, encoder, wanted, limit, progress)
        tokens = _read(passing / name)
        assert tokens is not None
    except BaseException:
        shutil.rmtree(passing, ignore_errors=True)
        raise
    weakref.finalize(tokens, shutil.rmtree, passing, ignore_errors=True)
    return tokens


def _writable(folder: Path) -> Path | None:
    """Return the folder, made if need be; None if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _tokenizer_key(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    return hashlib.sha256(f"{words} {tokenizer.special_tokens_map}".encode()).hexdigest()


def _batches(documents: Iterator[Document | None]) -> Iterator[list[Document | None]]:
    """Yield lists of documents, bounded in number and characters."""
    batch: list[Document | None] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += characters(document) if document else 0
        if len(batch) == _BATCH_DOCUMENTS or held > _BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    yield batch


def _write(
    path: Path,
    source: Source,
    encoder: Encoder,
    wanted: NDArray[np.bool_] | None,
    limit: int | None,
    progress: Progress | None,
) -> None:
    """Write the file, whole or not at all.

    Raises:
        DataError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    encoder.clear()
    documents: Iterator[Document | None] = source.documents()
    if wanted is not None:
        documents = (d if w else None for d, w in zip(documents, wanted, strict=True))
    lengths: list[NDArray[np.int32]] = []
    identities: list[int] = []
    total = done = 0
    try:
        with partial.open("wb") as file:
            file.write(bytes(8 + _HEADER_BYTES))
            for batch in _batches(documents):
                encoded = encoder(batch) if batch else []
                file.writelines(ids.tobytes() for ids in encoded)
                lengths.append(np.array([len(ids) for ids in encoded], dtype=np.int32))
                identities += [
                    identity(one) if one and len(ids) else 0
                    for one, ids in zip(batch, encoded, strict=True)
                ]
                total, done = total + int(lengths[-1].sum()), done + len(batch)
                if progress is not None:
                    progress(done, max(done, source.rows or 0), "tokenising")
                if limit is not None and total >= limit:
                    break
            if source.stream:  # which passes over rows without text, so they are not seen here
                rows = source.reader
                check_left(source.name, rows.left_out, rows.rows, source.notes())
            about = {
                "licences": json.dumps(sorted(source.licences)),
                "notes": json.dumps([*source.notes(), *encoder.notes(source.name)]),
            }
            same = np.array(identities, dtype=np.int64)
            _finish(file, total, np.concatenate(lengths), same, about)
        partial.replace(path)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        raise DataError(
            f"{path.parent}: tokens cannot be written there "
            f"({'no space left' if full else error.strerror or error}). "
            "Free some space, or set XDG_CACHE_HOME to a folder elsewhere."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _finish(
    file: IO[bytes],
    total: int,
    lengths: NDArray[np.int32],
    identities: NDArray[np.int64],
    about: dict[str, str],
) -> None:
    """Append what is known of each document, and fill in the header of the file."""
    file.write(lengths.tobytes())
    file.write(identities.tobytes())
    ends = [4 * total, 4 * (total + len(lengths)), 4 * total + 12 * len(lengths)]
    header = {
        "__metadata__": about,
        "ids": {"dtype": "I32", "shape": [total], "data_offsets": [0, ends[0]]},
        "lengths": {"dtype": "I32", "shape": [len(lengths)], "data_offsets": ends[:2]},
        "identities": {"dtype": "I64", "shape": [len(lengths)], "data_offsets": ends[1:]},
    }
    file.seek(0)
    file.write(struct.pack("<Q", _HEADER_BYTES))
    file.write(json.dumps(header).encode().ljust(_HEADER_BYTES))


def _read(path: Path) -> Tokens | None:
    """Return what a file holds, None if it is not there or not what was written."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            ids = file.get_tensor("ids").numpy()
            lengths = file.get_tensor("lengths").numpy().astype(np.int64)
            identities = file.get_tensor("identities").numpy()
            about = file.metadata()
        licences, notes = json.loads(about["licences"]), json.loads(about["notes"])
    except Exception:  # cut short, something else: it is written again
        return None
    ends = np.fromiter(itertools.accumulate(lengths.tolist()), np.int64, len(lengths))
    if len(ends) and ends[-1] != len(ids):
        return None
    return Tokens(ids, lengths, ends - lengths, tuple(licences), tuple(notes), identities)
