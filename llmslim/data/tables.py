"""Read the rows of a table in a file: JSON lines, JSON, CSV or Parquet, each also packed with gzip.

Rows come one at a time, in the file's order or, for Parquet, in one drawn from a seed; no file is
held in memory as a whole, but for a .json file that is one list, and a Parquet file inside a .gz,
which is read from its end. A .json file that is no list is read as JSON lines, as `datasets` does.
What is wrong with a file is told with its name and the line.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from llmslim.errors import DataError

TABLES = (".jsonl", ".json", ".csv", ".parquet")

Row = Mapping[str, Any]
Pick = Callable[[Sequence[str]], Sequence[str]]
"""From the columns that are there, those to read."""

_BATCH = 256
_LONGEST_FIELD = 2**31 - 1  # the csv module's own limit is 128 KiB, less than many an article


def kind(path: Path) -> str:
    """Return the ending that says what a file holds: `.jsonl` for `a.JSONL.gz`."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def read_rows(
    path: Path, pick: Pick, *, order: random.Random | None = None
) -> Iterator[tuple[str, Row]]:
    """Read a table's rows.

    Args:
        path: a file whose `kind` is one of TABLES.
        pick: chooses the columns of a Parquet file; it may raise if the right ones are not there.
        order: for Parquet, what draws the order of the rows; without it, the file's own order.

    Yields:
        Where the row stands, for messages, and the row.

    Raises:
        DataError: if the file cannot be read, is cut short or is something else than its name says.
    """
    if kind(path) == ".parquet":
        return _parquet(path, pick, order)
    if kind(path) == ".csv":
        return _csv(path)
    return _json_list(path) if kind(path) == ".json" and _is_list(path) else _jsonl(path)


def count_rows(path: Path) -> int | None:
    """Return the number of rows where a file says it itself, as Parquet does."""
    if path.suffix.lower() != ".parquet":
        return None
    import pyarrow
    from pyarrow import parquet

    try:
        return int(parquet.read_metadata(path).num_rows)
    except (pyarrow.ArrowException, OSError):  # told when the rows are read
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
    """Return bytes as text, line ends as Unix has them.

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


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            text = decode(line, where)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{where}: not JSON ({error}); every line is one object. Mend the line."
                ) from error
            yield where, _object(row, where, "line")


def _object(row: Any, where: str, what: str) -> Row:
    """Return a row.

    Raises:
        DataError: if it is anything but an object.
    """
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: {type(row).__name__}; every {what} is one JSON object, such as "
            '{"text": "..."}.'
        )
    return row


def _is_list(path: Path) -> bool:
    """Tell whether a file begins as a list in JSON does."""
    with opened(path) as file:
        line = next((line for line in file if line.removeprefix(codecs.BOM_UTF8).strip()), b"")
    return line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _json_list(path: Path) -> Iterator[tuple[str, Row]]:
    with opened(path) as file:
        text = decode(file.read(), str(path))
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(
            f"{path}{line}: not JSON ({error}); the file is one list of objects. Mend it."
        ) from error
    for number, row in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        yield where, _object(row, where, "item of the list")


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    """Read a CSV file, whose first line names the columns.

    Raises:
        DataError: if a row has more or fewer fields than there are names.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    with opened(path) as file:
        # Not decoded as a whole: a field may hold line ends, so the csv module reads the lines.
        lines = (decode(line, f"{path}:{n}") for n, line in enumerate(file, start=1))
        reader = csv.reader(lines, strict=True)
        try:
            names = next(reader, [])
            for fields in reader:
                where = f"{path}:{reader.line_num}"
                if not fields:
                    continue
                if len(fields) != len(names):
                    raise DataError(
                        f"{where}: {len(fields)} fields; the first line names {len(names)} "
                        f"columns, {', '.join(names)}. Quote fields that hold commas."
                    )
                yield (
                    f"{where} (columns named by line 1)",
                    dict(zip(names, fields, strict=True)),
                )
        except csv.Error as error:
            raise DataError(
                f"{path}:{reader.line_num}: not CSV ({error}). Mend the line."
            ) from error


def _parquet(path: Path, pick: Pick, order: random.Random | None) -> Iterator[tuple[str, Row]]:
    """Read rows, one batch in memory at a time; in random order, one row group.

    Raises:
        DataError: if the file is not whole.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with opened(path) as file:
            # Parquet is read from its end, which a compressed stream does not reach cheaply.
            packed = path.name.lower().endswith(".gz")
            table = parquet.ParquetFile(io.BytesIO(file.read()) if packed else file)
            chosen = set(pick(table.schema_arrow.names))
            # Pictures and sounds are not even read.
            columns = [f.name for f in table.schema_arrow if f.name in chosen and _no_bytes(f.type)]
            for numbers, batch in _batches(table, columns, order):
                for number, row in zip(numbers, _rows(batch, path, numbers), strict=True):
                    yield f"{path}: row {number + 1}", row
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path}: not a whole Parquet file ({str(error).splitlines()[0].rstrip('.')}). "
            "Download or copy it again."
        ) from error


def _no_bytes(kind: Any) -> bool:
    """Tell whether a column's type has no bytes in it, at any depth."""
    from pyarrow import types

    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return False
    inner = kind.num_fields if types.is_nested(kind) else 0
    return all(_no_bytes(kind.field(index).type) for index in range(inner))


def _rows(batch: Any, path: Path, numbers: Sequence[int]) -> list[Row]:
    """Return a batch's rows as dictionaries.

    Raises:
        DataError: if one holds bytes that are no text.
    """
    try:
        return cast(list[Row], batch.to_pylist())
    except UnicodeDecodeError:
        for index, number in enumerate(numbers):
            try:
                batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: row {number + 1}: byte {error.start} of a text is not UTF-8, the "
                    "only encoding that is read. Mend the row."
                ) from error
        raise


def _batches(
    table: Any, columns: list[str], order: random.Random | None
) -> Iterator[tuple[Sequence[int], Any]]:
    """Yield batches of rows, each with the numbers of its rows, from 0."""
    if order is None:
        done = 0
        for batch in table.iter_batches(batch_size=_BATCH, columns=columns):
            yield range(done, done + len(batch)), batch
            done += len(batch)
        return
    begins = [0]
    for group in range(table.num_row_groups):
        begins.append(begins[-1] + table.metadata.row_group(group).num_rows)
    groups = list(range(table.num_row_groups))
    order.shuffle(groups)
    for group in groups:
        rows = table.read_row_group(group, columns=columns)
        indices = list(range(rows.num_rows))
        order.shuffle(indices)
        for start in range(0, len(indices), _BATCH):
            some = indices[start : start + _BATCH]
            yield [begins[group] + index for index in some], rows.take(some)
