"""Read the rows of a table in a file: JSON lines, JSON, CSV or Parquet, each also packed with gzip.

Rows come one at a time, in the file's order or, for Parquet, in one drawn from a seed. No file is
held in memory as a whole, except a .json file that is one list, and a Parquet file inside a .gz,
which is read from its end. A .json file that is no list is read as JSON lines, as `datasets` does.
Errors name the file and the row. Values are what the file holds: `datasets` guesses types
(docs/architecture.md).

Left out: .json files with a list inside an object, separators other than commas, encodings other
than UTF-8. One line of Python makes JSON lines of them.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import pyarrow
from pyarrow import parquet, types

from llmslim.errors import DataError

TABLES = (".jsonl", ".json", ".csv", ".parquet")

Row = Mapping[str, Any]
PlacedRow = tuple[str, Row]
"""Where a row is, for messages, and the row."""

_BATCH_ROWS = 256
_LONGEST_FIELD = 2**31 - 1  # the csv module's own limit is 128 KiB, less than many an article


def kind(path: Path) -> str:
    """Return the ending that names a file's format: `.jsonl` for `a.JSONL.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_rows(path: Path, *, order: random.Random | None = None) -> Iterator[PlacedRow]:
    """Read a table's rows.

    Args:
        path: a file whose `kind` is one of TABLES.
        order: for Parquet, draws the order of row groups and of the rows in each; without it, the
            file's own order.

    Returns:
        Where each row is, for messages, and the row.

    Raises:
        DataError: if the file cannot be read, is cut short or is not what its name promises.
    """
    if kind(path) == ".parquet":
        return _parquet(path, order)
    if kind(path) == ".csv":
        return _csv(path)
    return _json_list(path) if kind(path) == ".json" and _is_list(path) else _json_lines(path)


def count_rows(path: Path) -> int | None:
    """Return the number of rows of a Parquet file, None for other files and broken ones."""
    if path.suffix.lower() == ".parquet":
        with suppress(pyarrow.ArrowException, OSError):  # reported when the rows are read
            return int(parquet.read_metadata(path).num_rows)
    return None


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
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


def decode(data: bytes, where: str) -> str:
    """Return bytes as text, with Unix line ends.

    Raises:
        DataError: if they are not UTF-8.
    """
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {error.start} is not UTF-8, the only encoding that is read. "
            "Convert it, as iconv does."
        ) from error


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each line's place, for messages, and the line.

    Raises:
        DataError: if the file cannot be read or is not UTF-8.
    """
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            yield where, decode(line, where)


def _json_lines(path: Path) -> Iterator[PlacedRow]:
    for where, line in lines_of(path):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{where}: not JSON ({error}); every line is one object. Correct the line."
                ) from error
            yield where, _object(row, where, "line")


def _is_list(path: Path) -> bool:
    with opened(path) as file:
        line = next((line for line in file if line.removeprefix(codecs.BOM_UTF8).strip()), b"")
    return line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _json_list(path: Path) -> Iterator[PlacedRow]:
    with opened(path) as file:
        text = decode(file.read(), str(path))
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(
            f"{path}{line}: not JSON ({error}); the file is one list of objects. Correct it."
        ) from error
    for number, row in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        yield where, _object(row, where, "item of the list")


def _object(row: Any, where: str, what: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: {type(row).__name__}; every {what} is one JSON object, such as "
            '{"text": "..."}.'
        )
    return row


def _csv(path: Path) -> Iterator[PlacedRow]:
    csv.field_size_limit(_LONGEST_FIELD)
    # A field may hold line ends, so the csv module reads the lines.
    reader = csv.reader((line for _, line in lines_of(path)), strict=True)
    try:
        names = next(reader, [])
        for fields in reader:
            where = f"{path}:{reader.line_num}"
            if fields and len(fields) != len(names):
                raise DataError(
                    f"{where}: {len(fields)} fields; the first line names {len(names)} "
                    f"columns, {', '.join(names)}. Quote fields that hold commas."
                )
            if fields:
                yield f"{where} (columns named by line 1)", dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: not CSV ({error}). Correct the line."
        ) from error


def _parquet(path: Path, order: random.Random | None) -> Iterator[PlacedRow]:
    try:
        with opened(path) as file:
            # Parquet is read from its end, which a compressed stream does not reach cheaply.
            packed = path.name.lower().endswith(".gz")
            table = parquet.ParquetFile(io.BytesIO(file.read()) if packed else file)
            # Pictures and sounds are not even read.
            columns = [field.name for field in table.schema_arrow if not _has_bytes(field.type)]
            for numbers, batch in _batches(table, columns, order):
                for number, row in zip(numbers, _to_rows(batch, path, numbers), strict=True):
                    yield f"{path}: row {number + 1}", row
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path}: not a whole Parquet file ({str(error).splitlines()[0].rstrip('.')}). "
            "Download or copy it again."
        ) from error


def _has_bytes(column: Any) -> bool:
    """Return whether a column's type has bytes in it, at any depth."""
    inner = (
        [column.field(n).type for n in range(column.num_fields)] if types.is_nested(column) else []
    )
    return any(map(_has_bytes, inner)) if inner else "binary" in str(column)


def _to_rows(batch: Any, path: Path, numbers: Sequence[int]) -> list[Row]:
    try:
        return cast(list[Row], batch.to_pylist())
    except UnicodeDecodeError as error:
        if len(batch) > 1:  # one at a time, to find which
            each = ((batch.slice(index, 1), [n]) for index, n in enumerate(numbers))
            return [row for one, number in each for row in _to_rows(one, path, number)]
        raise DataError(
            f"{path}: row {numbers[0] + 1}: byte {error.start} of a text is not UTF-8, the "
            "only encoding that is read. Correct the row."
        ) from error


def _batches(
    table: Any, columns: list[str], order: random.Random | None
) -> Iterator[tuple[Sequence[int], Any]]:
    """Yield batches of rows, each with the numbers of its rows, from 0."""
    if order is None:
        done = 0
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            yield range(done, done + len(batch)), batch
            done += len(batch)
        return
    sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    groups = list(range(len(sizes)))
    order.shuffle(groups)
    for group in groups:
        rows, first = table.read_row_group(group, columns=columns), sum(sizes[:group])
        indices = list(range(rows.num_rows))
        order.shuffle(indices)
        for start in range(0, len(indices), _BATCH_ROWS):
            some = indices[start : start + _BATCH_ROWS]
            yield [first + index for index in some], rows.take(some)
