"""Read documents from a file or from a data set on the hub.

A document is a text, or a conversation: a list of messages with roles. A plain-text file is one
document; of tables (JSON lines, JSON, CSV, Parquet, the hub) every row is one, and what it holds is
known by the names of its columns. Rows come in an order drawn from a seed, since tables are often
sorted: Parquet by permuting row groups and the rows in each, the others through a buffer, so that
no file but a JSON list is held in memory as a whole.

Left out: folders of files, and columns under other names. One line of Python makes JSON lines of
them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from llmslim.errors import DataError

from .columns import RowReader, characters
from .hub import HUB_NAME, stream_rows
from .messages import Document
from .tables import TABLES, decode, kind, opened, read_rows

TEXT = (".txt", ".text", ".md", ".raw", ".tokens")

_BUFFER_ROWS, _BUFFER_CHARACTERS = 10_000, 2**25


def read_texts(
    name_or_path: str, *, seed: int = 0, reader: RowReader | None = None
) -> Iterator[Document]:
    """Read documents, one after the other; nothing is opened before the first is asked for.

    Args:
        name_or_path: a .txt, .jsonl, .json, .csv or .parquet file, also with .gz behind; or the
            name of a data set on the hub as `owner/name`, `name:config` or `name:config:split`. The
            split is `train` where none is given.
        seed: of the order in which rows come.
        reader: makes documents of rows, and counts those that hold none.

    Yields:
        Texts, or conversations as lists of messages. Empty ones are passed over.

    Raises:
        DataError: if it cannot be found or read, or has no columns of a known layout.
    """
    order = random.Random(seed)
    reader = reader or RowReader()
    path = local_file(name_or_path)
    if path is not None:
        yield from _read_file(path, order, reader)
        return
    rows = enumerate(stream_rows(name_or_path, seed), start=1)
    documents = (reader(row, f"{name_or_path}: row {number}") for number, row in rows)
    yield from shuffled((document for document in documents if document), order)


def local_file(name_or_path: str) -> Path | None:
    """Return the file that a name means, None if it is the name of a data set on the hub.

    Raises:
        DataError: if it is a folder, or looks like a path but nothing is there.
    """
    path = Path(name_or_path).expanduser()
    if not name_or_path.strip():
        raise DataError("data: an empty name; needed are a file or a data set's name on the hub.")
    if path.is_dir():
        raise DataError(
            f"{name_or_path}: a folder; a file is needed ({_endings()}). "
            "Name one of the files in it, or join them into one."
        )
    if path.is_file():
        if kind(path) not in {*TEXT, *TABLES}:
            raise DataError(
                f"{path}: ends in {path.suffix or 'nothing'}; allowed are {_endings()}. "
                "Rename or convert the file."
            )
        return path
    if _looks_like_a_path(name_or_path):
        raise DataError(f"{name_or_path}: no such file. Check the path.")
    return None


def shuffled(documents: Iterable[Document], order: random.Random) -> Iterator[Document]:
    """Yield documents in random order, as far as a bounded buffer reaches."""
    buffer: list[Document] = []
    held = 0
    for document in documents:
        buffer.append(document)
        held += characters(document)
        while len(buffer) > _BUFFER_ROWS or held > _BUFFER_CHARACTERS:
            index = order.randrange(len(buffer))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            drawn = buffer.pop()
            held -= characters(drawn)
            yield drawn
    order.shuffle(buffer)
    yield from buffer


def _read_file(path: Path, order: random.Random, reader: RowReader) -> Iterator[Document]:
    if kind(path) in TEXT:
        with opened(path) as file:
            text = decode(file.read(), str(path))
        if text.strip():
            yield text
        return
    rows = read_rows(path, lambda columns: reader.pick(columns, str(path)), order=order)
    documents = (reader(row, where) for where, row in rows)
    there = (document for document in documents if document)
    yield from there if kind(path) == ".parquet" else shuffled(there, order)


def _endings() -> str:
    return f"{', '.join((*TEXT, *TABLES))}, each also with .gz"


def _looks_like_a_path(given: str) -> bool:
    return (
        kind(Path(given)) in {*TEXT, *TABLES}
        or given.startswith((".", "/", "~"))
        or not HUB_NAME.fullmatch(given)
    )
