"""Read a report back from a slim checkpoint, or from the file that `llmslim plan --json` wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path

from llmslim.errors import CheckpointError
from llmslim.surgery.report import Report

REPORT_FILE = "llmslim_report.json"


def read_report(path: str | Path) -> Report:
    """Return the report at `path`.

    Args:
        path: a slim checkpoint's folder, or a report file.

    Raises:
        CheckpointError: if there is none, or it cannot be read.
    """
    path = Path(path)
    folder = os.path.isdir(path)  # noqa: PTH112  (Path's raises on names that are too long)
    file = path / REPORT_FILE if folder else path
    if not os.path.isfile(file):  # noqa: PTH113  (Path's raises on names that are too long)
        what = f"no {REPORT_FILE} in it" if folder else "no such folder or file"
        raise CheckpointError(
            f"{path}: {what}; a report is in every folder that `llmslim convert` wrote, and what "
            "`llmslim plan --json FILE` writes is one. Give one of those."
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}).") from error
    return Report.from_dict(data, where=str(file))
