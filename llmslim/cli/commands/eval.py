"""`llmslim eval`: measure how good a model is."""

from __future__ import annotations

from typing import Any

import click

from llmslim.cli.evaluation import show_evaluation
from llmslim.cli.options import options_from
from llmslim.cli.output import json_option, progress, write_json
from llmslim.cli.settings import backend
from llmslim.options import EvalOptions


@click.command()
@click.argument("model")
@options_from(EvalOptions)
@json_option
def command(model: str, json_target: str | None, **keywords: Any) -> None:
    """Measure how good MODEL is, on text or on tasks.

    MODEL is a dense or slim model: a hub id, a folder, or a .gguf file. Text gives loss and
    perplexity, and with --against a dense model how far the predictions are from its own. Scores of
    a checkpoint that llmslim wrote are kept in its folder, and shown by `llmslim report`.
    """
    with progress() as moved:
        found = backend().evaluate(model, **keywords, progress=moved)
    if json_target != "-":
        show_evaluation(found)
    write_json(found.to_dict(), json_target)
