"""A conversion: the request, once its model is found, and the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llmslim.options import ConvertOptions
from llmslim.progress import Progress
from llmslim.recipe import Recipe
from llmslim.report.report import Report
from llmslim.storage import Source


@dataclass(frozen=True)
class Request:
    """A conversion whose model was found."""

    source: Source
    recipe: Recipe
    target: Path
    device: torch.device
    options: ConvertOptions
    """With the method, the texts and the bytes of a file that the caller's come to."""
    progress: Progress


@dataclass(frozen=True)
class Conversion:
    """What `convert` made."""

    path: Path
    """The checkpoint's folder."""
    report: Report
    auto_class: str = "AutoModelForCausalLM"
    """Name of the class of transformers' that loads it."""
