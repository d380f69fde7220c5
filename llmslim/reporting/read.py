"""Read a report back from a slim checkpoint, or from the file that `llmslim plan --json` wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    file = _file(path)
    return Report.from_dict(_read(file), where=str(file))


def read_healing(path: str | Path) -> Mapping[str, Any] | None:
    """Return what a checkpoint says of its healing, as `HealReport.to_dict` gives it.

    Args:
        path: as for `read_report`.

    Returns:
        None where it was not healed.

    Raises:
        CheckpointError: if there is no report, or it cannot be read.
    """
    data = _read(_file(path))
    healing = data.get("healing") if isinstance(data, dict) else None
    return healing if isinstance(healing, dict) else None


def _file(path: str | Path) -> Path:
    """Find the report's file.

    Raises:
        CheckpointError: if there is none.
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
    return file


def _read(file: Path) -> Any:
    """Return a file's JSON.

    Raises:
        CheckpointError: if it is none.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}).") from error
