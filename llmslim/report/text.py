"""A report for a terminal: title, table, totals, problems, and bars with `full`.

Wide terminals get a table of seven columns (`error` is the mean of the line's rows). Where that
does not fit, structure, shape and error move to a second line below each name: nothing is left
out. Colours add nothing to the words, and terminals without Unicode get ASCII.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmslim.errors import printable
from llmslim.report.report import Report

from . import wording
from .bars import Bars, plain_table
from .lines import Line, fold, unfolded

STYLES = {
    "replaced": "green",
    "resized": "green",
    "kept": "dim",
    "unmatched": "yellow",
    "tied": "dim cyan",
    "dropped": "red",
}
"""One style per action."""

_STRUCTURE = 2
"""Column that may wrap in the wide table ..."""
_STRUCTURE_WIDTH = 24
"""... but not below this."""
_UNBOUNDED = 100_000
_WIDTH = 120


class TextView:
    """A rich renderable of a report.

    Args:
        report: what to show.
        full: one line per row instead of folded ones, and the bars.
        bars: whether a bar per decoder layer follows the table; by default as `full`.
    """

    def __init__(self, report: Report, *, full: bool = False, bars: bool | None = None) -> None:
        self.report = report
        self.lines = unfolded(report.rows) if full else fold(report.rows)
        self.bars = full if bars is None else bars

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        times = "x" if options.ascii_only else "×"  # noqa: RUF001  (meant)
        yield Text(wording.title(self.report), style="bold")
        yield ""
        wide = self._wide(times)
        structures = wide.columns[_STRUCTURE]
        structures.max_width = _STRUCTURE_WIDTH
        needed = Measurement.get(console, options.update(width=_UNBOUNDED), wide).maximum
        structures.max_width = None
        yield wide if needed <= options.max_width else self._narrow(times)
        yield ""
        if self.bars:
            yield Bars(self.report)
            yield ""
        yield self._totals()
        if self.report.fitted_to:
            yield ""
            yield Text(wording.fitted_to(self.report))
        yield from self._problems()

    def _wide(self, times: str) -> Table:
        errors = any(line.init_errors for line in self.lines)
        table = _table("name", "action", "structure", "out x in", "parameters", "kept")
        table.columns[_STRUCTURE].no_wrap = False
        if errors:
            table.add_column("error", justify="right", no_wrap=True)
        for line in self.lines:
            words, shape = wording.structure(line.first), wording.shape(line.first)
            error = [wording.mean_error(line)] if errors else []
            numbers = (shape, *_params(line), *error)
            table.add_row(_name(line, times), _action(line), Text(words), *numbers)
        return table

    def _narrow(self, times: str) -> Table:
        table = _table("name", "action", "parameters", "kept")
        table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
        for line in self.lines:
            error = wording.error(line)
            words, shape = wording.structure(line.first), wording.shape(line.first)
            details = Text(
                ", ".join(filter(None, (words, shape, f"error {error}" if error else ""))),
                style="dim",
            )
            name: RenderableType = _name(line, times)
            if details:
                name = Group(name, Padding(details, (0, 0, 0, 2)))
            table.add_row(name, _action(line), *_params(line))
        return table

    def _totals(self) -> Table:
        table = _table("total", "before", "after", "kept")
        for cells in wording.totals_table(self.report.totals):
            table.add_row(*cells)
        return table

    def _problems(self) -> Iterator[RenderableType]:
        if self.report.problems:
            yield ""
            yield Text("problems", style="bold yellow")
        for problem in self.report.problems:
            yield Text(f"- {printable(problem)}")


def _table(*headings: str) -> Table:
    table = plain_table()
    for heading in headings:
        left = heading in ("name", "action", "structure", "total")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    return table


def _name(line: Line, times: str) -> Text:
    name = Text(printable(line.name))
    return name.append(f" {times}{len(line.rows)}", "bold") if len(line.rows) > 1 else name


def _action(line: Line) -> Text:
    action = wording.action(line.first)
    return Text(action, STYLES.get(action, ""))


def _params(line: Line) -> tuple[str, str]:
    before, after = line.params_before, line.params_after
    return f"{wording.short(before)} -> {wording.short(after)}", wording.percent(after, before)


def as_text(report: Report, *, full: bool = False) -> str:
    """Return the view as text without colour, 120 columns wide; with `full`, as `TextView`."""
    out = io.StringIO()
    console = Console(file=out, width=_WIDTH, color_system=None, force_terminal=False)
    console.print(TextView(report, full=full))
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def as_svg(report: Report, *, full: bool = False) -> str:
    """Return the view, in colour, as an SVG picture for READMEs; with `full`, as `TextView`."""
    console = Console(
        record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(TextView(report, full=full))
    return console.export_svg(title=printable(f"llmslim: {report.model} with {report.recipe}"))
