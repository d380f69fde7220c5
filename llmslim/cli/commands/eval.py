"""`llmslim eval`: measure how good a model is."""

from __future__ import annotations

import json
from typing import Any

import click

from llmslim.cli.evaluation import show_evaluation
from llmslim.cli.options import options_from
from llmslim.cli.output import progress, write_out
from llmslim.cli.settings import backend
from llmslim.options import EvalOptions


@click.command()
@click.argument("model")
@options_from(EvalOptions)
@click.option("--json", "json_target", metavar="FILE", help="Write JSON too; - for JSON on stdout.")
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
    if json_target is not None:
        write_out(json.dumps(found.to_dict(), indent=2) + "\n", json_target)
