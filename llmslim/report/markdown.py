"""A report as Markdown tables, for issues, READMEs and model cards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llmslim.errors import printable
from llmslim.report.report import Report

from . import wording
from .lines import fold, unfolded


def as_markdown(report: Report, *, full: bool = False) -> str:
    """Return the report as Markdown: headline, totals, rows, text fitted to, problems.

    Args:
        report: what to write.
        full: one line per row instead of folded ones.
    """
    title = f"# {_cell(wording.title(report))}"
    blocks = [title, totals_table(report), rows_table(report, full=full)]
    if report.fitted_to:
        blocks.append(wording.fitted_to(report))
    if report.problems:
        problems = "".join(f"- {printable(problem)}\n" for problem in report.problems)
        blocks.append(f"## Problems\n\n{problems}".rstrip())
    return "\n\n".join(blocks) + "\n"


def totals_table(report: Report) -> str:
    """Return the totals as a Markdown table."""
    return _table(("total", "before", "after", "kept"), "lrrr", wording.totals_table(report.totals))


def rows_table(report: Report, *, full: bool = False) -> str:
    """Return the rows as a Markdown table.

    Args:
        report: what to write.
        full: one line per row instead of folded ones.
    """
    lines = unfolded(report.rows) if full else fold(report.rows)
    head = ["name", "rows", "action", "structure", "out x in", "before", "after", "kept", "error"]
    cells = (
        (
            f"`{printable(line.name)}`",
            str(len(line.rows)),
            wording.action(line.first),
            wording.structure(line.first),
            wording.shape(line.first),
            f"{line.params_before:,}",
            f"{line.params_after:,}",
            wording.percent(line.params_after, line.params_before),
            wording.error(line),
        )
        for line in lines
    )
    return _table(head, "lrllrrrrr", cells)


def _table(head: Sequence[str], sides: str, rows: Iterable[Sequence[str]]) -> str:
    rule = ["---" if side == "l" else "---:" for side in sides]
    cells = [[_cell(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *cells])


def _cell(text: str) -> str:
    """Return text that cannot end a cell."""
    return text.replace("|", "\\|")
