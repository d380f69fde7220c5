"""Read documents from a file or from a data set on the hub.

A document is a text, or a conversation: a list of messages with roles. A plain-text file is one
document; of tables (JSON lines, Parquet, the hub) every row is one, and what it holds is known by
the names of its columns. Rows come in an order drawn from a seed, since tables are often sorted:
Parquet by permuting row groups and the rows in each, the others through a buffer, so that no
file is held in memory as a whole.

Left out: .json and .csv files, folders of files, and columns under other names. One line of
Python makes JSON lines of them.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from llmslim.errors import DataError

from .columns import Document, document_of, layout_of

TEXT = (".txt", ".text", ".md", ".raw", ".tokens")
TABLES = (".jsonl", ".parquet")
SHORT_NAMES = {"lamini": "MBZUAI/LaMini-instruction"}

_HUB_NAME = re.compile(
    r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<config>[^:]*))?(?::(?P<split>.+))?"
)
_BUFFER_ROWS, _BUFFER_CHARACTERS = 10_000, 2**25
_BATCH = 256


def read_texts(name_or_path: str, *, seed: int = 0) -> Iterator[Document]:
    """Read documents, one after the other; nothing is opened before the first is asked for.

    Args:
        name_or_path: a .txt, .jsonl or .parquet file, also with .gz behind; or the name of a data
            set on the hub as `owner/name`, `name:config` or `name:config:split`. The split is
            `train` where none is given.
        seed: of the order in which rows come.

    Yields:
        Texts, or conversations as lists of messages. Empty ones are passed over.

    Raises:
        DataError: if it cannot be found or read, or has no columns of a known layout.
    """
    path = Path(name_or_path).expanduser()
    order = random.Random(seed)
    if not name_or_path.strip():
        raise DataError("data: an empty name; needed are a file or a data set's name on the hub.")
    if path.is_dir():
        raise DataError(
            f"{name_or_path}: a folder; a file is needed ({_endings()}). "
            "Name one of the files in it, or join them into one."
        )
    if path.is_file():
        yield from _read_file(path, order)
    elif _looks_like_a_path(name_or_path):
        raise DataError(f"{name_or_path}: no such file. Check the path.")
    else:
        yield from _shuffled(_read_hub(name_or_path, seed), order)


def _endings() -> str:
    return f"{', '.join((*TEXT, *TABLES))}, each also with .gz"


def _kind(path: Path) -> str:
    """Return the ending that says what a file holds: `.jsonl` for `a.JSONL.gz`."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _looks_like_a_path(given: str) -> bool:
    return (
        _kind(Path(given)) in {*TEXT, *TABLES}
        or given.startswith((".", "/", "~"))
        or not _HUB_NAME.fullmatch(given)
    )


def _read_file(path: Path, order: random.Random) -> Iterator[Document]:
    kind = _kind(path)
    if kind in TEXT:
        with _opened(path) as file:
            text = _decode(file.read(), str(path))
        if text.strip():
            yield text
    elif kind == ".jsonl":
        yield from _shuffled(_read_jsonl(path), order)
    elif kind == ".parquet":
        yield from _read_parquet(path, order)
    else:
        raise DataError(
            f"{path}: ends in {path.suffix or 'nothing'}; allowed are {_endings()}. "
            "Rename or convert the file."
        )


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, unpacked if it is a .gz.

    Raises:
        DataError: if reading it fails, within the block as well.
    """
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            yield cast(IO[bytes], file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: not a whole gzip file ({error}). Download or copy it again."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {error.start} is not UTF-8, the only encoding that is read. "
            "Convert it, as iconv does."
        ) from error


def _read_jsonl(path: Path) -> Iterator[Document]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            text = _decode(line, where)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{where}: not JSON ({error}); every line is one object. Mend the line."
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{where}: {type(row).__name__}; every line is one JSON object, such as "
                    '{"text": "..."}.'
                )
            document = document_of(row, where)
            if document:
                yield document


def _read_parquet(path: Path, order: random.Random) -> Iterator[Document]:
    """Read rows in random order, one row group in memory at a time.

    Raises:
        DataError: if the file is not whole, or has no columns of a known layout.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with _opened(path) as file:
            # Parquet is read from its end, which a compressed stream does not reach cheaply.
            packed = path.name.lower().endswith(".gz")
            table = parquet.ParquetFile(io.BytesIO(file.read()) if packed else file)
            columns = list(layout_of(table.schema_arrow.names, str(path)))
            groups = list(range(table.num_row_groups))
            order.shuffle(groups)
            for group in groups:
                rows = table.read_row_group(group, columns=columns)
                indices = list(range(rows.num_rows))
                order.shuffle(indices)
                for start in range(0, len(indices), _BATCH):
                    for row in rows.take(indices[start : start + _BATCH]).to_pylist():
                        document = document_of(row, str(path))
                        if document:
                            yield document
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path}: not a whole Parquet file ({str(error).splitlines()[0].rstrip('.')}). "
            "Download or copy it again."
        ) from error


def _read_hub(given: str, seed: int) -> Iterator[Document]:
    """Stream a data set, its files in random order.

    Raises:
        DataError: if there is none of that name, or the hub cannot be reached.
    """
    from datasets import load_dataset

    match = _HUB_NAME.fullmatch(SHORT_NAMES.get(given, given))
    assert match is not None
    name, config, split = match["name"], match["config"] or None, match["split"] or "train"
    try:
        stream = load_dataset(name, config, split=split, streaming=True)
        # The buffer is ours, bounded in characters; this draws the order of the files.
        rows: Iterator[Mapping[str, Any]] = iter(stream.shuffle(seed=seed % 2**32, buffer_size=1))
        for row in rows:
            document = document_of(row, given)
            if document:
                yield document
    except DataError:
        raise
    except Exception as error:  # name lookup, proxies, offline mode, wrong splits: many classes
        lines = str(error).strip().splitlines() or [""]
        raise DataError(
            f"{given}: not a local file, and no data set of the hub could be read by that name "
            f"({type(error).__name__}: {lines[0].rstrip('.')}). "
            "Check the name and the connection, or give a file."
        ) from error


def _shuffled(documents: Iterable[Document], order: random.Random) -> Iterator[Document]:
    """Yield documents in random order, as far as a bounded buffer reaches."""
    buffer: list[Document] = []
    held = 0
    for document in documents:
        buffer.append(document)
        held += _characters(document)
        while len(buffer) > _BUFFER_ROWS or held > _BUFFER_CHARACTERS:
            index = order.randrange(len(buffer))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            drawn = buffer.pop()
            held -= _characters(drawn)
            yield drawn
    order.shuffle(buffer)
    yield from buffer


def _characters(document: Document) -> int:
    if isinstance(document, str):
        return len(document)
    return sum(len(message["content"]) for message in document)
