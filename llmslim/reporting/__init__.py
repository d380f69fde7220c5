"""Views of a `Report`: text, JSON, Markdown, CSV, SVG, and the model card.

None of them counts anything again: they fold, order and word the numbers of the report. A format
is a module here with `render(report, *, full) -> str` and a line in `FORMATS`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmslim.surgery.report import Report

FORMATS: dict[str, str] = {
    "text": "text",
    "json": "json",
    "md": "markdown",
    "csv": "csv",
    "svg": "picture",
}
"""Format name to the module that renders it; imported when asked for."""


def render(report: Report, format_name: str, *, full: bool = False) -> str:
    """Return a report in one of the formats.

    Args:
        report: what to show.
        format_name: a key of `FORMATS`.
        full: one line per module, where the format would fold alike ones into one line.

    Raises:
        ValueError: if there is no such format.
    """
    if format_name not in FORMATS:
        raise ValueError(f"report format {format_name!r}; allowed {', '.join(FORMATS)}")
    module = importlib.import_module(f".{FORMATS[format_name]}", __name__)
    return str(module.render(report, full=full))
