"""`llmslim bench`: measure how fast a model generates."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from llmslim.cli.evaluation import show_benchmark
from llmslim.cli.options import options_from
from llmslim.cli.output import progress, write_out
from llmslim.cli.settings import backend
from llmslim.options import BenchOptions


@click.command()
@click.argument("model")
@options_from(BenchOptions)
@click.option("--json", "json_target", metavar="FILE", help="Write JSON too; - for JSON on stdout.")
def command(model: str, json_target: str | None, **keywords: Any) -> None:
    """Measure how fast MODEL generates, with transformers.

    MODEL is a dense or slim model: a hub id, a folder, or a .gguf file. With --against, a dense
    model is measured in turn with it, and the share of the possible gain is shown. Speeds of a
    checkpoint that llmslim wrote are kept in its folder, and shown by `llmslim report`.
    """
    with progress() as moved:
        found = backend().bench(model, **keywords, progress=moved)
    if json_target != "-":
        show_benchmark(found)
    if json_target is not None:
        write_out(json.dumps(asdict(found), indent=2) + "\n", json_target)
