"""Read what is known of a slim checkpoint, or a file that `llmslim plan --json` wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmslim.errors import CheckpointError
from llmslim.report import wording
from llmslim.report.report import Report
from llmslim.report.scores import Evaluation, read_evaluation
from llmslim.report.speeds import Benchmark, read_benchmarks
from llmslim.storage import HISTORY, MANIFEST, RECIPE, REPORT, read_json_if_whole


@dataclass(frozen=True)
class ReportFile:
    """A report, and all else that its file and the folder around it hold."""

    report: Report
    data: Mapping[str, Any]
    """The whole file."""
    folder: Path | None = None
    """The checkpoint; None for a file by itself."""

    @property
    def name(self) -> str:
        """What to call it: the folder's name, or the model's without its owner."""
        if self.folder is not None:
            return self.folder.resolve().name
        return self.report.model.rpartition("/")[2] or "model"

    @property
    def healing(self) -> Mapping[str, Any] | None:
        """`HealReport.to_dict` of a healed model, else None."""
        healing = self.data.get("healing")
        return healing if isinstance(healing, dict) else None

    @property
    def scores(self) -> Evaluation | None:
        """What `llmslim eval` found, if anything.

        Raises:
            CheckpointError: if the file holds something else.
        """
        return read_evaluation(self.folder) if self.folder else None

    @property
    def benchmarks(self) -> tuple[Benchmark, ...]:
        """What `llmslim bench` found, one for each device and type.

        Raises:
            CheckpointError: if the file holds something else.
        """
        return read_benchmarks(self.folder) if self.folder else ()

    @property
    def history(self) -> list[dict[str, Any]]:
        """Steps and measurements of a healing, in order; empty where there was none.

        Raises:
            CheckpointError: if the file holds something else.
        """
        lines = self._text(HISTORY).splitlines() if self.healing else []
        try:
            found = [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.folder}/{HISTORY}: not JSON ({error}).") from error
        return [line for line in found if isinstance(line, dict) and "step" in line]

    @property
    def recipe_text(self) -> str:
        """The recipe's YAML; empty where the folder has none."""
        return self._text(RECIPE)

    def commands(self, recipe: str = RECIPE) -> list[str]:
        """Return the commands that make the model again; none where they are not on record.

        Args:
            recipe: where the recipe's file is.
        """
        healed = self.healing is not None
        return wording.commands(self.report, recipe, healed=healed) if self.recipe_text else []

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest; empty where the folder has none."""
        return read_json_if_whole(self.folder / MANIFEST) if self.folder else {}

    def show(self) -> Path:
        """Open the page of all this in the browser; return the temporary file with it."""
        from llmslim.report.page.html import open_page, report_page  # which imports this module

        return open_page(report_page(self))

    def _text(self, name: str) -> str:
        if self.folder is None or not (self.folder / name).is_file():
            return ""
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder / name}: cannot be read ({error}).") from error


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
    report = Report.from_dict(data, where=str(file))
    return ReportFile(report, data, path if folder else None)
