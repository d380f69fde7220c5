"""`llmslim heal`: train a slim model until it is of use again."""

from __future__ import annotations

from typing import Any

import click

from llmslim.cli.healing import heal_and_show, plan_and_show
from llmslim.cli.options import options_from
from llmslim.options import HealOptions


@click.command()
@click.argument("model", metavar="SLIM")
@options_from(HealOptions)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only check everything, and say what would be trained and how much memory that takes.",
)
def command(model: str, dry_run: bool, **options: Any) -> None:
    """Train SLIM until it is of use again, and write it to a new folder.

    What is not given here is as the recipe in SLIM says. Several GPUs or machines:
    `accelerate launch -m llmslim heal ...`. A run that was killed continues with --resume.
    """
    if options["tokens"] is not None and options["epochs"] is not None:
        raise click.UsageError("--tokens and --epochs say the same thing; give one.")
    (plan_and_show if dry_run else heal_and_show)(model, **options)
