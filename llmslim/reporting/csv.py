"""A report as CSV: a header, and a line for each row with all of its fields.

`options` is JSON in its cell; what a row does not have is an empty cell. Totals and problems are
not in it: sums belong to whoever reads the table.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, fields

from llmslim.surgery.report import Report, Row


def render(report: Report, *, full: bool = False) -> str:  # noqa: ARG001  (always every row)
    """Return the rows as CSV text.

    Args:
        report: what to write.
        full: changes nothing: every row is always there.
    """
    out = io.StringIO()
    names = [field.name for field in fields(Row)]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for row in report.rows:
        writer.writerow({**asdict(row), "options": json.dumps(row.options)})
    return out.getvalue()
