"""What a conversion is asked to do, and what it made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmslim.checkpoint import Source
from llmslim.recipe import Recipe
from llmslim.surgery import Progress, Report

RecipeLike = Recipe | str | Path | Mapping[str, Any]
"""A recipe, its file, the name of a shipped one, or a mapping shaped like a recipe file."""


@dataclass(frozen=True)
class Job:
    """A conversion whose model was found and whose recipe fits it."""

    source: Source
    recipe: Recipe
    target: Path
    init: str | None
    dtype: str | None
    seed: int
    calibration: tuple[str, ...]
    """Texts in place of the recipe's, if any."""
    calibration_tokens: int | None
    device: torch.device
    trust_remote_code: bool
    allow_nonfinite: bool
    max_shard_size: int
    resume: bool
    overwrite: bool
    tell: Progress


@dataclass(frozen=True)
class Conversion:
    """What `convert` made."""

    path: Path
    """The checkpoint's folder."""
    report: Report
    auto_class: str = "AutoModelForCausalLM"
    """Name of the class of transformers' that loads it."""
