"""`llmslim heal`: train a slim model until it is of use again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llmslim.cli.healing import heal_and_show, plan_and_show


def _read_settings(
    _ctx: click.Context, _param: click.Parameter, pairs: tuple[str, ...]
) -> dict[str, Any]:
    """Read KEY=VALUE pairs; values as in YAML."""
    import yaml

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"{pair!r}; KEY=VALUE is needed, as in warmup=0.1.")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise click.BadParameter(f"{pair!r}; its value is not YAML.") from error
    return found


@click.command()
@click.argument("model", metavar="SLIM")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to write; by default ./SLIM-healed.",
)
@click.option(
    "-r", "--recipe", help="Recipe whose `heal` section is followed, in place of SLIM's own."
)
@click.option(
    "--data",
    metavar="NAME|FILE",
    help="Text to train on: lamini, self (sampled from the teacher), a data set on the hub, or a "
    ".jsonl, .json, .parquet, .csv or .txt file.",
)
@click.option("--teacher", metavar="MODEL", help="The dense model, to learn from.")
@click.option(
    "--train",
    type=click.Choice(["blocks", "all", "lora"]),
    help="What is trained: what surgery changed, everything, or that and LoRA on the rest.",
)
@click.option("--objective", metavar="NAME", help="cross_entropy, logits or layers.")
@click.option("--tokens", type=click.IntRange(min=1), metavar="N", help="How many to train on.")
@click.option("--epochs", type=float, metavar="N", help="Passes over the data.")
@click.option("--learning-rate", type=float, metavar="RATE", help="At its peak.")
@click.option("--context-length", type=click.IntRange(min=1), metavar="N", help="Of a packed row.")
@click.option("--batch-size", type=click.IntRange(min=1), metavar="ROWS", help="Of one step.")
@click.option("--seed", type=int, help="Of shuffling and of the held-out rows.")
@click.option(
    "--set",
    "other",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_read_settings,
    help="Any other key of the `heal` section; may be given more than once.",
)
@click.option("--resume", is_flag=True, help="Go on with a healing that was interrupted.")
@click.option(
    "--overwrite", is_flag=True, help="Replace the folder, and throw an unfinished healing away."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only check everything, and say what would be trained and how much memory that takes.",
)
def command(
    model: str,
    out: Path | None,
    recipe: str | None,
    data: str | None,
    teacher: str | None,
    train: str | None,
    tokens: int | None,
    epochs: float | None,
    seed: int | None,
    other: dict[str, Any],
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    **keys: Any,
) -> None:
    """Train SLIM until it is of use again, and write it to a new folder.

    What is not given here is as the recipe in SLIM says. Several GPUs or machines:
    `accelerate launch -m llmslim heal ...`. A run that was killed goes on with --resume.
    """
    if tokens is not None and epochs is not None:
        raise click.UsageError("--tokens and --epochs say the same thing; give one.")
    given = {key: value for key, value in keys.items() if value is not None}
    (plan_and_show if dry_run else heal_and_show)(
        model,
        out,
        recipe=recipe,
        data=data,
        teacher=teacher,
        train=train,
        tokens=tokens,
        epochs=epochs,
        seed=seed,
        settings={**other, **given},
        resume=resume,
        overwrite=overwrite,
    )
