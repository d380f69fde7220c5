"""`llmslim heal`: train a slim model to recover its quality."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from llmslim.cli.healing import as_data, heal_and_show, plan_and_show
from llmslim.cli.options import options_from
from llmslim.cli.output import json_option, out_argument, write_json
from llmslim.options import HealOptions


@click.command()
@click.argument("model", metavar="SLIM")
@options_from(HealOptions)
@json_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only check the inputs, and show what would be trained and the memory it would take.",
)
@out_argument
def command(model: str, dry_run: bool, json_target: str | None, **options: Any) -> None:
    """Train SLIM to recover its quality.

    SLIM is a folder that `llmslim convert` wrote, or any other causal language model; the result
    goes to a new folder. Options that are not given come from the `heal` section of the recipe in
    SLIM. For several GPUs or machines, run `accelerate launch -m llmslim heal ...`. A killed run
    continues with --resume.
    """
    if options["tokens"] is not None and options["epochs"] is not None:
        raise click.UsageError("--tokens and --epochs are two units for the same length; give one.")
    if dry_run:
        write_json(asdict(plan_and_show(model, json_target, **options)), json_target)
    elif (done := heal_and_show(model, json_target, **options)) is not None:
        write_json(as_data(done), json_target)
