"""A report for programs, as JSON and as CSV; always every row, whatever `full` is."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, fields

from llmslim.report.report import Report, Row


def as_json(report: Report, *, full: bool = False) -> str:  # noqa: ARG001
    """Return the report as JSON text, which `Report.from_dict` reads back."""
    return json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n"


def as_csv(report: Report, *, full: bool = False) -> str:  # noqa: ARG001
    """Return a header and a line for each row; `options` is JSON in its cell.

    Totals and problems are left out.
    """
    out = io.StringIO()
    names = [field.name for field in fields(Row)]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for row in report.rows:
        writer.writerow({**asdict(row), "options": json.dumps(row.options)})
    return out.getvalue()
