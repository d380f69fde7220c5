"""Read the report of a slim checkpoint, or a file that `llmslim plan --json` wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmslim.errors import CheckpointError
from llmslim.report.report import Report
from llmslim.storage import REPORT


@dataclass(frozen=True)
class ReportFile:
    """A report, and all else that its file holds."""

    report: Report
    data: Mapping[str, Any]
    """The whole file."""

    @property
    def healing(self) -> Mapping[str, Any] | None:
        """`HealReport.to_dict` of a healed model, else None."""
        healing = self.data.get("healing")
        return healing if isinstance(healing, dict) else None


def read_report(path: str | Path) -> ReportFile:
    """Return the report at `path`.

    Args:
        path: a slim checkpoint's folder, or a report file.

    Raises:
        CheckpointError: if there is none, or it cannot be read.
    """
    path = Path(path)
    folder = os.path.isdir(path)  # noqa: PTH112  (Path's raises on names that are too long)
    file = path / REPORT if folder else path
    if not os.path.isfile(file):  # noqa: PTH113  (Path's raises on names that are too long)
        what = f"no {REPORT} in it" if folder else "no such folder or file"
        raise CheckpointError(
            f"{path}: {what}; every folder that `llmslim convert` writes has a report, and "
            "`llmslim plan --json FILE` writes one. Give one of those."
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}).") from error
    return ReportFile(Report.from_dict(data, where=str(file)), data)
