"""Tokenise a source into one file, once; read it through the operating system's memory map.

The file is safetensors: `ids`, all documents one after the other (int32, tokens without loss as
~id, see prompts.py); `lengths`, one for each document; and `identities`, which are equal for equal
documents. It grows on disk while the source is read, so that neither text nor tokens are ever held
as a whole, and takes its name only when it is complete. Its name is a hash of everything that it
depends on: the source's content, the tokenizer, the template. Where no cache can be written it is a
temporary file that is removed with the object.

Documents are numbered in the source's order; one that is empty or not needed has length 0.
"""

from __future__ import annotations

import hashlib
import json
import os
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

from llmslim.atomic import disk_problem, new_file
from llmslim.errors import DataError
from llmslim.progress import Progress

from .columns import check_left_out
from .messages import Document, characters, identity
from .prompts import Encoder, Ids
from .sampling import cache_folder
from .sources import Source

_FORMAT = 3  # raise it with every change of what is in the file
_HEADER_BYTES = 2**16  # written last, when the sizes are known; the space for it comes first
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 1024, 2**22


@dataclass(eq=False)
class Tokens:
    """The D documents of a source as ids, T tokens in all."""

    ids: Ids
    """All documents, one after the other, (T,); on disk."""
    lengths: NDArray[np.int64]
    """Tokens of each document, (D,)."""
    starts: NDArray[np.int64]
    """Where in `ids` each document begins, (D,)."""
    licences: tuple[str, ...] = ()
    """Those that the rows name."""
    notes: tuple[str, ...] = ()
    """Sentences about what was left out or changed."""
    identities: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Equal for equal documents, 0 for one of no length, (D,)."""


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
        source: the documents.
        encoder: turns documents into ids.
        cache: folder to keep the file in; in the user's cache if not given.
        wanted: which documents are needed; all if not given.
        limit: stop at this number of tokens.
        progress: called with documents done, documents in all (as far as known), `tokenising`.

    Raises:
        DataError: if the source cannot be read, or the file not be written.
    """
    chosen = "all" if wanted is None else hashlib.sha256(wanted.tobytes()).hexdigest()
    about = [_FORMAT, source.key, encoder.key, _tokenizer_key(encoder.tokenizer), chosen, limit]
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32] + ".safetensors"
    folder = cache or cache_folder("tokens")
    temporary = not _writable(folder)
    if temporary:
        folder = Path(tempfile.mkdtemp(prefix="llmslim-"))
    try:
        tokens = _read(folder / name)
        if tokens is None:
            _write(folder / name, source, encoder, wanted, limit, progress)
            tokens = _read(folder / name)
        assert tokens is not None
    except BaseException:
        if temporary:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if temporary:
        weakref.finalize(tokens, shutil.rmtree, folder, ignore_errors=True)
    return tokens


def _writable(folder: Path) -> bool:
    """Return whether files can be written in a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


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
    encoder.clear()
    documents: Iterator[Document | None] = source.documents()
    if wanted is not None:
        documents = (d if w else None for d, w in zip(documents, wanted, strict=True))
    lengths: list[int] = []
    identities: list[int] = []
    total = 0
    try:
        with new_file(path) as file:
            file.write(bytes(8 + _HEADER_BYTES))
            for batch in _batches(documents):
                encoded = encoder(batch) if batch else []
                file.writelines(ids.tobytes() for ids in encoded)
                lengths += map(len, encoded)
                identities += [
                    identity(one) if one and len(ids) else 0
                    for one, ids in zip(batch, encoded, strict=True)
                ]
                total += sum(map(len, encoded))
                if progress is not None:
                    progress(len(lengths), max(len(lengths), source.rows or 0), "tokenising")
                if limit is not None and total >= limit:
                    break
            if source.stream:  # which passes over rows without text, so they are not seen here
                rows = source.reader
                check_left_out(source.name, rows.left_out, rows.rows, source.notes())
            about = {
                "licences": json.dumps(sorted(source.licences)),
                "notes": json.dumps([*source.notes(), *encoder.notes(source.name)]),
            }
            _finish(file, total, lengths, identities, about)
    except OSError as error:
        raise DataError(
            f"{path.parent}: {disk_problem(error) or error} Or set XDG_CACHE_HOME to another one."
        ) from error


def _finish(
    file: IO[bytes], total: int, lengths: list[int], identities: list[int], about: dict[str, str]
) -> None:
    """Append the numbers of each document, and fill in the header of the file."""
    file.write(np.array(lengths, dtype=np.int32).tobytes())
    file.write(np.array(identities, dtype=np.int64).tobytes())
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
    try:
        with safe_open(path, "pt") as file:
            ids = file.get_tensor("ids").numpy()
            lengths = file.get_tensor("lengths").numpy().astype(np.int64)
            identities = file.get_tensor("identities").numpy()
            about = file.metadata()
        licences, notes = json.loads(about["licences"]), json.loads(about["notes"])
    except Exception:  # not there, cut short, anything else: it is written again
        return None
    ends = np.cumsum(lengths)
    if len(ends) and ends[-1] != len(ids):
        return None
    return Tokens(ids, lengths, ends - lengths, tuple(licences), tuple(notes), identities)
