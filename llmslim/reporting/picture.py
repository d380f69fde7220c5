"""A report as an SVG picture of the text view, for READMEs; rich draws it."""

from __future__ import annotations

import io

from rich.console import Console

from llmslim.surgery.report import Report

from . import wording
from .text import TextView

_WIDTH = 120


def render(report: Report, *, full: bool = False) -> str:
    """Return the text view, in colour, as SVG.

    Args:
        report: what to draw.
        full: one line per row instead of folded ones, and the bars.
    """
    console = Console(
        record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(TextView(report, full=full))
    return console.export_svg(title=wording.plain(f"llmslim: {report.model} with {report.recipe}"))
