"""What a checkpoint says of how it was made, as far as healing needs to know."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmslim.errors import CheckpointError, SlimError
from llmslim.recipe import Recipe
from llmslim.surgery.depth import kept_layers
from llmslim.surgery.report import Report
from llmslim.surgery.sites import find_layers

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class SlimFolder:
    """What a checkpoint holds beside its weights; all None in one that llmslim did not write."""

    recipe: Recipe | None = None
    report: Report | None = None
    report_data: dict[str, Any] | None = None
    """The report's file, with what a Report leaves out."""
    base_model: str | None = None
    """What the model card calls the source model."""

    def teacher_layers(self) -> tuple[int, ...] | None:
        """Return which layers of the source model are left, None where that is not known.

        Raises:
            RecipeError: if recipe and report do not fit each other.
        """
        if self.recipe is None or self.report is None:
            return None
        found = (_LAYER.search(row.name) for row in self.report.rows)
        count = 1 + max((int(match[1]) for match in found if match), default=-1)
        return kept_layers(self.recipe, count) if count else None

    def narrowed(self, model: Any) -> list[str]:
        """Return the names, in this model, of dense maps that surgery made of another size.

        Args:
            model: loaded from this checkpoint.
        """
        if self.report is None:
            return []
        stack = find_layers(model).path
        kept = self.teacher_layers() or ()
        now = {before: after for after, before in enumerate(kept)}
        names = []
        for row in self.report.rows:
            if row.action == "dropped" or row.params_before == row.params_after:
                continue
            match = re.match(rf"{re.escape(stack)}\.(\d+)\.", row.name)
            if match and row.kind == "projection" and int(match[1]) in now:
                names.append(f"{stack}.{now[int(match[1])]}.{row.name[match.end() :]}")
        return names


def read_slim_folder(folder: Path) -> SlimFolder:
    """Read recipe, report and base model of a checkpoint; what is not there is None.

    Args:
        folder: the checkpoint.

    Raises:
        CheckpointError: if a file is there and cannot be read.
        RecipeError: if the recipe is not one.
    """
    recipe_file, report_file = folder / "recipe.yaml", folder / "llmslim_report.json"
    recipe = Recipe.load(recipe_file) if recipe_file.is_file() else None
    if not report_file.is_file():
        return SlimFolder(recipe=recipe, base_model=_base_model(folder))
    try:
        data = json.loads(report_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{report_file}: cannot be read as JSON ({error}).") from error
    report = Report.from_dict(data, where=str(report_file))
    return SlimFolder(recipe, report, data, _base_model(folder))


def _base_model(folder: Path) -> str | None:
    """Return the front matter's `base_model`; anybody may have edited the card."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---\n")[1])
        name = front.get("base_model")
    except (OSError, ValueError, IndexError, AttributeError, yaml.YAMLError, SlimError):
        return None
    return name if isinstance(name, str) else None
