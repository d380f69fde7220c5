"""Where the text of healing comes from: one source, opened, ready to be read any number of times.

A source's rows are numbered in the order of the file or data set, after its filter, empty ones
included: so a split drawn over these numbers is the one that `datasets` draws over the same rows.

What is larger than a few gigabytes, and needed only in part, is a stream: rows in an order drawn
from the seed, as far as a bounded buffer reaches, and no more of them than asked for.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmslim.recipe.schema import HealSource

from .columns import LICENCE, RowReader, check_fields
from .hub import downloaded_rows, hub_info, hub_page, stream_rows
from .messages import Document, mended
from .tables import TABLES, count_rows, decode, kind, opened, read_rows
from .text import local_file, shuffled

REFUSALS = (
    "I am not",
    "I am an AI",
    "I do not",
    "I cannot",
    "t goes against my",
    "t is not my",
    "I don't have",
)
"""Rows of LaMini holding any of these are left out, as the source report does."""

_LARGE_BYTES = 2**31
_STRETCH_CHARACTERS = 8192
_MOST_LICENCES = 20

Item = tuple[Document | None, str | None]
"""A row's document, None if it is empty; and its licence, where it has one."""


@dataclass(eq=False)
class Source:
    """A source of documents."""

    name: str
    """As messages and model cards call it."""
    licence: str
    """Under which the text is given, as far as it is known without reading the rows."""
    key: str
    """Stands for its content and order."""
    items: Callable[[], Iterator[Item]]
    """Opens it; called once for each pass."""
    rows: int | None = None
    """How many there are before the filter, where that is known."""
    stream: bool = False
    """Read as far as needed only, in random order."""
    sampled: bool = False
    """Made for the purpose, so that there could be more of it."""
    filtered: bool = False
    """Whether rows that hold a refusal are left out."""
    held_out: int | None = None
    """Rows to hold out where nothing else is said, None for a share of them."""
    reader: RowReader = field(default_factory=RowReader)
    """Makes documents of the rows of a table, and counts what it leaves out."""
    licences: set[str] = field(default_factory=set)
    """What the rows of the last pass say their licence is."""
    _refusals: int = 0

    @property
    def endless(self) -> bool:
        """Whether there is as much of it as one asks for."""
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


def open_source(asked: HealSource, *, seed: int, in_part: bool) -> Source:
    """Return a source by what a recipe says about it; of files nothing but their hash is read.

    Args:
        asked: the data, its fields and its filter.
        seed: of the order of a stream.
        in_part: whether less than all of it may do.

    Raises:
        DataError: if it is not there, or the fields make no sense.
    """
    if asked.fields is not None:
        check_fields(asked.fields, f"heal.data {asked.data}")
    path = local_file(asked.data)
    source = (
        _open_hub(asked, seed, in_part=in_part)
        if path is None
        else _open_file(path, asked, seed, in_part=in_part)
    )
    given = asked.filter or ("refusals" if asked.data == "lamini" else "none")
    source.filtered = given == "refusals"
    source.key = f"{source.key} {sorted((asked.fields or {}).items())} {given}"
    if source.stream:
        source.key += f" {seed}"
    return source


def _open_file(path: Path, asked: HealSource, seed: int, *, in_part: bool) -> Source:
    stream = in_part and kind(path) in TABLES and path.stat().st_size > _LARGE_BYTES
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()

    reader = RowReader(asked.fields)

    def items() -> Iterator[Item]:
        if kind(path) not in TABLES:
            yield from ((stretch, None) for stretch in _stretches(path))
            return
        order = random.Random(seed) if stream else None
        for where, row in read_rows(path, lambda names: reader.pick(names, str(path)), order=order):
            yield _item(reader, row, where)

    return Source(
        name=path.name,
        licence="as given by the file's owner",
        key=f"{digest} {kind(path)}",
        items=(lambda: _in_random_order(items(), seed)) if stream else items,
        rows=count_rows(path),
        stream=stream,
        reader=reader,
    )


def _stretches(path: Path) -> Iterator[str]:
    """Cut a text at line ends into documents of some pages, of which some can be held out."""
    lines: list[str] = []
    characters = 0
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            lines.append(decode(line, f"{path}:{number}"))
            characters += len(lines[-1])
            if characters > _STRETCH_CHARACTERS:
                yield "".join(lines).strip()
                lines, characters = [], 0
    if text := "".join(lines).strip():
        yield text


def _open_hub(asked: HealSource, seed: int, *, in_part: bool) -> Source:
    lamini = asked.data == "lamini"
    info = hub_info(asked.data)
    small = info.size_bytes is not None and info.size_bytes <= _LARGE_BYTES
    stream = in_part and not lamini and not small
    source = Source(
        name=asked.data,
        licence="CC BY-NC 4.0" if lamini else info.licence or f"see {hub_page(asked.data)}",
        key=info.key,
        items=lambda: iter(()),
        stream=stream,
        held_out=5000 if lamini else None,
        reader=RowReader(asked.fields),
    )

    def items() -> Iterator[Item]:
        if stream:
            rows = stream_rows(asked.data, seed)
        else:
            source.rows, rows = downloaded_rows(asked.data)
        for number, row in enumerate(rows, start=1):
            yield _item(source.reader, row, f"{asked.data}: row {number}")

    source.items = (lambda: _in_random_order(items(), seed)) if stream else items
    return source


def _item(reader: RowReader, row: Mapping[str, Any], where: str) -> Item:
    licence = row.get(LICENCE)
    return reader(row, where), mended(str(licence)) if licence else None


def _in_random_order(items: Iterator[Item], seed: int) -> Iterator[Item]:
    """Yield the items that hold something, in random order; their licences come as they come."""
    seen: list[str | None] = []

    def documents() -> Iterator[Document]:
        for document, licence in items:
            seen[:] = [licence]
            if document:
                yield document

    for document in shuffled(documents(), random.Random(seed)):
        yield document, seen[0]


def _refuses(document: Document) -> bool:
    texts = [document] if isinstance(document, str) else [turn["content"] for turn in document]
    return any(refusal in text for text in texts for refusal in REFUSALS)
