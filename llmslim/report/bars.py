"""A bar per decoder layer: how many of its parameters are left, and how many were removed.

All bars have one scale, that of the largest layer before or after. What belongs to no numbered
layer (embeddings, head, last norm) has no bar.
"""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from llmslim.errors import printable
from llmslim.report.report import Report

from . import wording
from .lines import is_number

_HEADINGS = ("layer", "left", "kept")
_LEAST_WIDTH = 10
_MOST_WIDTH = 60


def plain_table() -> Table:
    """Return a table without lines, to add columns to."""
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")


class Bars:
    """A rich renderable of a report's layers."""

    def __init__(self, report: Report) -> None:
        self.layers = layer_params(report)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.layers:
            return
        # With one stack of layers, their numbers are enough.
        several = len({stack for stack, _ in self.layers}) > 1
        rows = [
            (
                printable(f"{stack}.{index}" if several else f"{index}"),
                wording.short(after),
                wording.percent(after, before),
            )
            for (stack, index), (before, after) in self.layers.items()
        ]
        columns = zip(_HEADINGS, *rows, strict=True)
        beside = sum(max(map(len, column)) + 2 for column in columns)
        width = max(_LEAST_WIDTH, min(_MOST_WIDTH, options.max_width - beside))
        widest = max(max(pair) for pair in self.layers.values()) or 1
        left, gone = ("#", ".") if options.ascii_only else ("█", "░")
        table = plain_table()
        for heading in _HEADINGS:
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("")
        for cells, (before, after) in zip(rows, self.layers.values(), strict=True):
            whole = round(width * max(before, after) / widest)
            filled = round(width * after / widest)
            bar = Text(left * filled, style="green").append(gone * (whole - filled), style="dim")
            table.add_row(*cells, bar)
        yield table


def layer_params(report: Report) -> dict[tuple[str, int], tuple[int, int]]:
    """Return parameters (before, after) by stack and index, such as ("model.layers", 3)."""
    layers: dict[tuple[str, int], tuple[int, int]] = {}
    for row in report.rows:
        parts = row.name.split(".")
        place = next((n for n, part in enumerate(parts) if is_number(part)), None)
        if place is not None:
            key = (".".join(parts[:place]), int(parts[place]))
            before, after = layers.get(key, (0, 0))
            layers[key] = (before + row.params_before, after + row.params_after)
    return dict(sorted(layers.items()))
