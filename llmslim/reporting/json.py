"""A report as JSON: `Report.to_dict`, dumped; `Report.from_dict` reads it back."""

from __future__ import annotations

import json

from llmslim.surgery.report import Report


def render(report: Report, *, full: bool = False) -> str:  # noqa: ARG001  (always every row)
    """Return the report as JSON text.

    Args:
        report: what to write.
        full: changes nothing: every row is always there.
    """
    return json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n"
