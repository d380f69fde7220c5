"""A `Report` and its views: text, JSON, Markdown, CSV, SVG, HTML, and the model card.

A view folds, orders and words the numbers of the report, and counts nothing itself. A format is a
function `(report, *, full) -> str` in a module here, and a line in `FORMATS`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmslim.report.report import Report

FORMATS: dict[str, tuple[str, str]] = {
    "text": ("text", "as_text"),
    "json": ("data", "as_json"),
    "md": ("markdown", "as_markdown"),
    "csv": ("data", "as_csv"),
    "svg": ("text", "as_svg"),
    "html": ("page.html", "as_html"),
}
"""Format name to module and function; imported when used."""


def render(report: Report, format_name: str, *, full: bool = False) -> str:
    """Return a report in one of the formats.

    Args:
        report: what to show.
        format_name: a key of `FORMATS`.
        full: one line per module, where the format would fold similar ones into one line.

    Raises:
        ValueError: if the format is not one of `FORMATS`.
    """
    if format_name not in FORMATS:
        raise ValueError(f"report format {format_name!r}; allowed {', '.join(FORMATS)}")
    module, function = FORMATS[format_name]
    view = getattr(importlib.import_module(f".{module}", __name__), function)
    return str(view(report, full=full))
