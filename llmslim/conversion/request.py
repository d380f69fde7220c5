"""A conversion: the request, once its model is found, and the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmslim.modeling.base_class import auto_class_name
from llmslim.modeling.modeling_llmslim import SlimModelMixin
from llmslim.options import ConvertOptions
from llmslim.progress import Progress
from llmslim.recipe import Recipe, recipe_yaml
from llmslim.report.card import model_card
from llmslim.report.read import read_report
from llmslim.report.report import Report
from llmslim.storage import Companions, Source, origin_of, published_name


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
    adds_own_text: bool
    """Whether `self` among the texts was added to those that the caller gave."""
    recorded: Mapping[str, Any]
    """The caller's options, for the report."""

    def record(self, report: Report) -> Report:
        """Return the report of the result, with what the conversion was given.

        Args:
            report: names the text that blocks were fitted to, if any.
        """
        options = {name: value for name, value in self.recorded.items() if name != "device"}
        if report.fitted_to:  # by default it depends on the machine, and nothing else does
            options["device"] = self.device.type
        return replace(report, given=published_name(self.source), options=options)

    def companions(
        self, model: PreTrainedModel, tokenizer: Any, report: Report, recipe: Recipe
    ) -> Companions:
        """Return what is written beside the weights.

        Args:
            model: the result, on any device.
            tokenizer: the source's.
            report: of the result.
            recipe: with the sizes that a budget came to.
        """
        text = recipe_yaml(recipe)
        return {
            "source": self.source,
            "tokenizer": tokenizer,
            "report": report.to_dict(),
            "recipe_text": text,
            "model_card": model_card(
                report,
                recipe_text=text,
                base_model=self.options.base_model or "",
                origin=origin_of(self.source),
                slim=isinstance(model, SlimModelMixin),
                auto_class=auto_class_name(model.config),
            ),
        }


@dataclass(frozen=True)
class Conversion:
    """What `convert` made."""

    path: Path
    """The checkpoint's folder."""
    report: Report
    auto_class: str = "AutoModelForCausalLM"
    """Name of the class of transformers' that loads it."""

    def __repr__(self) -> str:
        return f"{self.report!r}\nwritten to {self.path}"

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    def show(self) -> Path:
        """Open the checkpoint's page in the browser; return the temporary file with it."""
        return read_report(self.path).show()
