"""Where text comes from: a file or a data set on the hub, opened and read as documents.

A document is a text, or a conversation: a list of messages with roles. Every row of a table (JSON
lines, JSON, CSV, Parquet, the hub) is one; the names of its columns tell what it holds
(columns.py).

Calibration reads documents in an order drawn from a seed (`read_texts`), since tables are often
sorted: Parquet by permuting row groups and the rows in each, all others through a bounded buffer.

Healing numbers a source's rows in the order of the file or data set, after its filter, empty ones
included (`open_source`): so a split drawn over these numbers is the one that `datasets` draws over
the same rows. A source larger than a few gigabytes of which only a part is needed is a stream: rows
in random order, and no more of them than needed.

Left out: folders of files, and columns under other names without a field map.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llmslim.errors import DataError
from llmslim.recipe.schema import HealSource

from .columns import LICENCE, RowReader, check_fields
from .hub import HUB_NAME, downloaded_rows, hub_info, stream_rows
from .messages import Document, characters, replace_surrogates
from .tables import TABLES, PlacedRow, Row, count_rows, decode, kind, lines_of, opened, read_rows

TEXT = (".txt", ".text", ".md", ".raw", ".tokens")

REFUSALS = (
    "I am not",
    "I am an AI",
    "I do not",
    "I cannot",
    "t goes against my",
    "t is not my",
    "I don't have",
)
"""Rows of LaMini holding any of these are left out, as in the kphi-3 report."""

_BUFFER_ROWS, _BUFFER_CHARACTERS = 10_000, 2**25
_LARGE_BYTES = 2**31
_DOCUMENT_CHARACTERS = 8192  # at which a plain text is cut, at the next line end
_MOST_LICENCES = 20

Item = tuple[Document | None, str | None]
"""A row's document, None if it is empty; and its licence, where the row names one."""


def read_texts(
    name_or_path: str, *, seed: int = 0, reader: RowReader | None = None
) -> Iterator[Document]:
    """Read documents in random order; nothing is opened before the first is needed.

    Args:
        name_or_path: a .txt, .jsonl, .json, .csv or .parquet file, each also with .gz; or the
            name of a data set on the hub as `owner/name`, `name:config` or `name:config:split`. The
            split is `train` if none is given.
        seed: of the order of the rows.
        reader: makes documents of rows, and counts those that hold none.

    Yields:
        Texts, or conversations as lists of messages. A plain-text file is one document. Empty
        documents are passed over.

    Raises:
        DataError: if it cannot be found or read, or has no columns of a known layout.
    """
    order = random.Random(seed)
    reader = reader or RowReader()
    path = local_file(name_or_path)
    if path is not None and kind(path) in TEXT:
        with opened(path) as file:
            text = decode(file.read(), str(path))
        if text.strip():
            yield text
        return
    rows = _stream(name_or_path, seed) if path is None else read_rows(path, order=order)
    items = _items(rows, reader)
    if path is None or kind(path) != ".parquet":
        items = shuffled(items, order)
    yield from (document for document, _ in items if document)


def local_file(name_or_path: str) -> Path | None:
    """Return the file of that name, None if it is the name of a data set on the hub.

    Raises:
        DataError: if it is a folder, or looks like a path but nothing is there.
    """
    endings = f"{', '.join((*TEXT, *TABLES))}, each also with .gz"
    path = Path(name_or_path).expanduser()
    known = kind(path) in {*TEXT, *TABLES}
    if not name_or_path.strip():
        raise DataError("data: an empty name; needed are a file or a data set's name on the hub.")
    if path.is_dir():
        raise DataError(
            f"{name_or_path}: a folder; a file is needed ({endings}). "
            "Name one of the files in it, or join them into one."
        )
    if path.is_file():
        if known:
            return path
        raise DataError(
            f"{path}: ends in {path.suffix or 'nothing'}; allowed are {endings}. "
            "Rename or convert the file."
        )
    if known or name_or_path.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(name_or_path):
        raise DataError(f"{name_or_path}: no such file. Check the path.")
    return None


def shuffled(items: Iterable[Item], order: random.Random) -> Iterator[Item]:
    """Yield the items with a document in random order, as far as a bounded buffer reaches."""
    buffer: list[Item] = []
    held = 0
    for item in items:
        if not item[0]:
            continue
        buffer.append(item)
        held += characters(item[0])
        while len(buffer) > _BUFFER_ROWS or held > _BUFFER_CHARACTERS:
            index = order.randrange(len(buffer))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            drawn = buffer.pop()
            held -= characters(drawn[0] or "")
            yield drawn
    order.shuffle(buffer)
    yield from buffer


@dataclass(eq=False)
class Source:
    """A source of documents, which can be read any number of times."""

    name: str
    """As messages and model cards call it."""
    licence: str
    """Of the text, as far as it is known without reading the rows."""
    key: str
    """Identifies its content and order."""
    items: Callable[[], Iterator[Item]]
    """Opens it; called once for each pass."""
    rows: int | None = None
    """How many there are before the filter, where that is known."""
    stream: bool = False
    """Whether it is read only as far as needed, in random order."""
    sampled: bool = False
    """Whether a model wrote it, so that there could be more of it."""
    filtered: bool = False
    """Whether rows that hold a refusal are left out."""
    held_out: int | None = None
    """Rows to hold out if the recipe does not set a number, None for a share of them."""
    reader: RowReader = field(default_factory=RowReader)
    """Makes documents of the rows of a table, and counts what it leaves out."""
    licences: set[str] = field(default_factory=set)
    """Those that the rows of the last pass name."""
    _refusals: int = 0

    @property
    def endless(self) -> bool:
        """Whether it has as much text as anyone needs."""
        return self.stream or self.sampled

    def documents(self) -> Iterator[Document | None]:
        """Yield the document of each row, None for an empty one."""
        self._refusals = 0
        self.reader.clear()
        self.licences.clear()
        for document, licence in self.items():
            if self.filtered and document and _refuses(document):
                self._refusals += 1
                continue
            if licence and len(self.licences) < _MOST_LICENCES:
                self.licences.add(licence)
            yield document

    def notes(self) -> list[str]:
        """Return sentences about the last pass."""
        notes = self.reader.notes(self.name)
        if self._refusals:
            notes.append(f"{self.name}: {self._refusals} rows hold a refusal and were left out.")
        if self.stream:
            notes.append(f"{self.name}: large, so read from its beginning only as far as needed.")
        return notes


def open_source(spec: HealSource, *, seed: int, in_part: bool) -> Source:
    """Return a source of a recipe; of files only the hash is read.

    Args:
        spec: the data, its fields and its filter.
        seed: of the order of a stream.
        in_part: whether a part of it may be enough.

    Raises:
        DataError: if it is not there, or the fields make no sense.
    """
    if spec.fields is not None:
        check_fields(spec.fields, f"heal.data {spec.data}")
    path = local_file(spec.data)
    source = (
        _open_hub(spec, seed, in_part=in_part)
        if path is None
        else _open_file(path, spec, seed, in_part=in_part)
    )
    if source.stream:
        in_order = source.items
        source.items = lambda: shuffled(in_order(), random.Random(seed))
    chosen = spec.filter or ("refusals" if spec.data == "lamini" else "none")
    source.filtered = chosen == "refusals"
    source.key = f"{source.key} {sorted((spec.fields or {}).items())} {chosen}"
    if source.stream:
        source.key += f" {seed}"
    return source


def _open_file(path: Path, spec: HealSource, seed: int, *, in_part: bool) -> Source:
    table = kind(path) in TABLES
    stream = in_part and table and path.stat().st_size > _LARGE_BYTES
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    reader = RowReader(spec.fields)

    def items() -> Iterator[Item]:
        order = random.Random(seed) if stream else None
        return _items(read_rows(path, order=order), reader) if table else _cut(path)

    return Source(
        name=path.name,
        licence="as given by the file's owner",
        key=f"{digest} {kind(path)}",
        items=items,
        rows=count_rows(path),
        stream=stream,
        reader=reader,
    )


def _cut(path: Path) -> Iterator[Item]:
    """Cut a text at line ends into documents of some pages, of which some can be held out."""
    lines: list[str] = []
    length = 0
    for _, line in lines_of(path):
        lines.append(line)
        length += len(line)
        if length > _DOCUMENT_CHARACTERS:
            yield "".join(lines).strip(), None
            lines, length = [], 0
    if text := "".join(lines).strip():
        yield text, None


def _open_hub(spec: HealSource, seed: int, *, in_part: bool) -> Source:
    lamini = spec.data == "lamini"
    info = hub_info(spec.data)
    small = info.size_bytes is not None and info.size_bytes <= _LARGE_BYTES
    source = Source(
        name=spec.data,
        licence="CC BY-NC 4.0" if lamini else info.licence,
        key=info.key,
        items=lambda: iter(()),
        stream=in_part and not lamini and not small,
        held_out=5000 if lamini else None,
        reader=RowReader(spec.fields),
    )

    def items() -> Iterator[Item]:
        if source.stream:
            return _items(_stream(spec.data, seed), source.reader)
        source.rows, rows = downloaded_rows(spec.data)
        return _items(_numbered(spec.data, rows), source.reader)

    source.items = items
    return source


def _stream(given: str, seed: int) -> Iterator[PlacedRow]:
    return _numbered(given, stream_rows(given, seed))


def _numbered(given: str, rows: Iterable[Row]) -> Iterator[PlacedRow]:
    return ((f"{given}: row {number}", row) for number, row in enumerate(rows, start=1))


def _items(rows: Iterable[PlacedRow], reader: RowReader) -> Iterator[Item]:
    for where, row in rows:
        licence = row.get(LICENCE)
        yield reader(row, where), replace_surrogates(str(licence)) if licence else None


def _refuses(document: Document) -> bool:
    texts = [document] if isinstance(document, str) else [turn["content"] for turn in document]
    return any(refusal in text for text in texts for refusal in REFUSALS)
