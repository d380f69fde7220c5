"""Several slim models beside each other and beside their dense model: text, JSON, HTML."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmslim.errors import printable
from llmslim.report.bars import plain_table
from llmslim.report.measures import HEALING_LOSS, Measure, measures
from llmslim.report.page.charts import Axis, Plot
from llmslim.report.page.html import render_page
from llmslim.report.read import ReportFile
from llmslim.report.scores import Estimate

FORMATS = ("text", "json", "html")
_SIZE = "non-embedding"
_OTHER_SOURCES = (
    "These models were not made from one dense model: there is none to compare all of them with."
)


@dataclass(frozen=True)
class ComparedRow:
    """One quantity of every model."""

    measure: Measure
    """Of one of the models: its name, and how it is written."""
    dense: Estimate | None
    values: tuple[Estimate | None, ...]
    """Of each model, in their order; None where it was not measured."""

    @property
    def best(self) -> int | None:
        """The place of the best value of a row; None for sizes, and where there is no choice."""
        known = [(one.mean, place) for place, one in enumerate(self.values) if one is not None]
        if self.measure.kind == "size" or len(known) < 2:
            return None
        return (max if self.measure.more_is_better else min)(known)[1]


@dataclass(frozen=True)
class Comparison:
    """Several models and what is known of them."""

    names: tuple[str, ...]
    rows: tuple[ComparedRow, ...]
    dense: str
    """Name of the dense model; empty where they were made from several."""

    def plots(self) -> list[tuple[str, Plot]]:
        """Return a plot of loss over size for each text that two models were measured on."""
        size = next(row for row in self.rows if row.measure.name == _SIZE)
        found = []
        for row in self.rows:
            pairs = [
                (name, x.mean, y.mean, name == self.dense)
                for name, x, y in zip(
                    (self.dense, *self.names),
                    (size.dense, *size.values),
                    (row.dense, *row.values),
                    strict=True,
                )
                if x is not None and y is not None
            ]
            if row.measure.loss and len(pairs) > 1:
                x = Axis.over([one[1] for one in pairs], "parameters without embeddings")
                y = Axis.over([one[2] for one in pairs], "loss, nats", margin=0.15)
                points = tuple((name, x.at(a), y.at(b), dense) for name, a, b, dense in pairs)
                levels = tuple((name, height) for name, _, height, dense in points if dense)
                found.append((row.measure.name, Plot(x, y, levels=levels, points=points)))
        # Text that all were measured on tells more than what each was healed on.
        return sorted(found, key=lambda one: one[0].startswith(HEALING_LOSS))


def compare(found: Sequence[ReportFile]) -> Comparison:
    """Return what is known of some models, row by row.

    Args:
        found: the models, one at least.
    """
    known = [{one.name: one for one in measures(model)} for model in found]
    names = [model.name for model in found]
    if len(set(names)) < len(names):  # folders of one name in different places
        names = [str(model.folder or model.name) for model in found]
    sources = {(model.report.model, model.report.totals.params_before) for model in found}
    one_source = len(sources) == 1
    rows = []
    for name in dict.fromkeys(name for model in known for name in model):
        values = [model.get(name) for model in known]
        dense = next((one.dense for one in values if one and one.dense), None)
        first = next(one for one in values if one is not None)
        numbers = tuple(None if one is None else one.value for one in values)
        rows.append(ComparedRow(first, dense if one_source else None, numbers))
    dense_name = (found[0].report.model.rpartition("/")[2] or "dense") if one_source else ""
    return Comparison(tuple(names), tuple(rows), dense_name)


def as_table(found: Comparison) -> Table:
    """Return the comparison for a terminal; the best of each row is bold."""
    table = plain_table()
    table.add_column("", no_wrap=True)
    for name in (*([found.dense] if found.dense else []), *found.names):
        table.add_column(Text(printable(name)), justify="right", no_wrap=True)
    for row in found.rows:
        cells = [
            _cell(row, value, bold=place == row.best) for place, value in enumerate(row.values)
        ]
        dense = [_cell(row, row.dense, bold=False)] if found.dense else []
        table.add_row(Text(printable(row.measure.name)), *dense, *cells)
    return table


def _cell(row: ComparedRow, value: Estimate | None, *, bold: bool) -> Text:
    words = "-" if value is None else row.measure.write(value.mean)
    return Text(words, "bold" if bold else "")


def render_comparison(found: Comparison, format_name: str) -> str:
    """Return the comparison in one of `FORMATS`.

    Raises:
        ValueError: if the format is not one of these.
    """
    if format_name == "html":
        return render_page(
            "compare.html.j2",
            title="Comparison",
            found=found,
            note="" if found.dense else _OTHER_SOURCES,
        )
    if format_name == "json":
        return json.dumps(_data(found), indent=2) + "\n"
    if format_name != "text":
        raise ValueError(f"format {format_name!r}; allowed {', '.join(FORMATS)}")
    out = io.StringIO()
    Console(file=out, width=10_000, color_system=None, force_terminal=False).print(as_table(found))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join(lines + ([] if found.dense else ["", _OTHER_SOURCES])) + "\n"


def _data(found: Comparison) -> dict[str, Any]:
    def number(value: Estimate | None) -> dict[str, Any] | None:
        return None if value is None else asdict(value)

    return {
        "models": list(found.names),
        "dense": found.dense or None,
        "rows": [
            {
                "name": row.measure.name,
                "dense": number(row.dense),
                "values": [number(value) for value in row.values],
                "best": None if row.best is None else found.names[row.best],
            }
            for row in found.rows
        ],
    }
