"""`llmslim bench`: measure how fast a model generates."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from llmslim.cli.evaluation import show_benchmark
from llmslim.cli.options import options_from
from llmslim.cli.output import json_option, progress, write_json
from llmslim.cli.settings import backend
from llmslim.options import BenchOptions


@click.command()
@click.argument("model")
@options_from(BenchOptions)
@json_option
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
    write_json(asdict(found), json_target)
