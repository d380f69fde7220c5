"""A report in ten lines for a shell, and facts and tables for a notebook."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from llmslim.report import wording
from llmslim.report.lines import fold
from llmslim.report.page.html import render_page
from llmslim.report.report import Report

_ROWS = 30
"""Of a table in a notebook."""


def headline(report: Report) -> str:
    """Return the report in ten lines at most: kept share, totals, and what became of how many."""
    table = [("", "before", "after", "kept"), *wording.totals_table(report.totals)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    sides = ("<", ">", ">", ">")
    lines = [
        "  ".join(f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths, strict=True))
        for row in table
    ]
    counts = Counter(wording.action(row) for row in report.rows)
    modules = ", ".join(f"{number:,} {action}" for action, number in counts.most_common())
    notes = f"{len(report.problems)} notes in .problems" if report.problems else ""
    last = [f"modules: {modules or 'none'}", notes, "a page with every module: .show()"]
    return "\n".join([wording.title(report), *lines, *filter(None, last)])


def table(report: Report) -> str:
    """Return the report as a fragment of HTML: headline, totals, and the first folded rows."""
    lines = fold(report.rows)
    return render_page("notebook.html.j2", report=report, lines=lines[:_ROWS], all=len(lines))


def facts_table(title: str, facts: Iterable[tuple[str, str]]) -> str:
    """Return names and values as a fragment of HTML."""
    return render_page("facts.html.j2", title=title, facts=list(facts))


def facts_text(title: str, facts: Iterable[tuple[str, str]]) -> str:
    """Return names and values as lines below a title."""
    pairs = list(facts)
    width = max((len(name) for name, _ in pairs), default=0)
    return "\n".join([title, *(f"{name:<{width}}  {value}" for name, value in pairs)])
