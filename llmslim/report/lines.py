"""Fold rows that differ only in the number of their layer into one line.

`model.layers.0.mlp.up_proj` to `model.layers.29.mlp.up_proj` with one outcome become
`model.layers.{0-29}.mlp.up_proj`. A fold is exact: its name stands for its rows and no others, so
rows whose numbers form no full grid (experts of some layers only) become several lines.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmslim.report.report import Row

Numbers = tuple[int, ...]
Grid = tuple[Numbers, ...]
"""One tuple of values per number in a name; stands for their whole product."""


@dataclass(frozen=True)
class Line:
    """One or more rows with the same outcome."""

    name: str
    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        """The row that stands for all, except in sums and errors."""
        return self.rows[0]

    @property
    def params_before(self) -> int:
        """Parameters of all rows in the source model."""
        return sum(row.params_before for row in self.rows)

    @property
    def params_after(self) -> int:
        """Parameters of all rows in the slim model."""
        return sum(row.params_after for row in self.rows)

    @property
    def init_errors(self) -> list[float]:
        """The errors of the rows that have one."""
        return [row.init_error for row in self.rows if row.init_error is not None]


def fold(rows: Iterable[Row]) -> list[Line]:
    """Return rows folded into as few lines as possible, in the order of each line's first row.

    Args:
        rows: of a report.

    Example:
        >>> rows = [Row(f"layers.{n}.fc", "projection", "kept") for n in (0, 1, 2, 5)]
        >>> [(line.name, len(line.rows)) for line in fold(rows)]
        [('layers.{0-2,5}.fc', 4)]
    """
    groups: dict[tuple[tuple[str, ...], tuple[object, ...]], list[tuple[int, Numbers, Row]]] = {}
    for position, row in enumerate(rows):
        parts = row.name.split(".")
        pattern = tuple("#" if is_number(part) else part for part in parts)
        numbers = tuple(int(part) for part in parts if is_number(part))
        groups.setdefault((pattern, _outcome(row)), []).append((position, numbers, row))
    found = []
    for (pattern, _), members in groups.items():
        grids = _grids(list(dict.fromkeys(numbers for _, numbers, _ in members)))
        place = {
            numbers: index
            for index, grid in enumerate(grids)
            for numbers in itertools.product(*grid)
        }
        inside: list[list[tuple[int, Row]]] = [[] for _ in grids]
        for position, numbers, row in members:
            inside[place[numbers]].append((position, row))
        for grid, numbered in zip(grids, inside, strict=True):
            line = Line(_name(pattern, grid), tuple(row for _, row in numbered))
            found.append((numbered[0][0], line))
    return [line for _, line in sorted(found, key=lambda pair: pair[0])]


def unfolded(rows: Iterable[Row]) -> list[Line]:
    """Return one line per row."""
    return [Line(row.name, (row,)) for row in rows]


def is_number(part: str) -> bool:
    """Return whether a part of a dotted name is a number."""
    return part.isascii() and part.isdecimal()


def _outcome(row: Row) -> tuple[object, ...]:
    """Return all that the rows of a line have in common."""
    return (
        row.kind,
        row.action,
        # The reason names the dropped layer, which would separate the layers.
        row.reason if row.action != "dropped" else "",
        row.structure,
        json.dumps(row.options, sort_keys=True),
        row.in_features,
        row.out_features,
        row.params_before,
        row.params_after,
    )


def _grids(found: Sequence[Numbers]) -> list[Grid]:
    """Return grids that together contain exactly the given numbers, each once."""
    if not found[0]:
        return [()]
    tails: dict[int, list[Numbers]] = {}
    for head, *tail in found:
        tails.setdefault(head, []).append(tuple(tail))
    # Heads followed by the same grids belong together.
    heads: dict[tuple[Grid, ...], list[int]] = {}
    for head, rest in tails.items():
        heads.setdefault(tuple(_grids(rest)), []).append(head)
    return [(tuple(own), *grid) for grids, own in heads.items() for grid in grids]


def _name(pattern: Sequence[str], grid: Grid) -> str:
    values = iter(grid)
    return ".".join(_spans(next(values)) if part == "#" else part for part in pattern)


def _spans(numbers: Numbers) -> str:
    """Write numbers as shells do: `{0-2,5}`; a single one as itself."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    words = [f"{a}" if a == b else f"{a}-{b}" for a, b in spans]
    return words[0] if len(numbers) == 1 else f"{{{','.join(words)}}}"
