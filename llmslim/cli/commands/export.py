"""`llmslim export`: write a slim checkpoint in another form."""

from __future__ import annotations

from pathlib import Path

import click

from llmslim.cli.settings import backend, settings


@click.command()
@click.argument("slim")
@click.option("--dense", is_flag=True, help="Multiply every block out; the only form so far.")
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write."
)
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
@click.option("--allow-nonfinite", is_flag=True, help="Accept weights that are NaN or infinite.")
def command(slim: str, dense: bool, out: Path, overwrite: bool, allow_nonfinite: bool) -> None:
    """Write SLIM as an ordinary dense model.

    Programs without llmslim's layers can load the result. It computes the same as SLIM, and is as
    large as the model that SLIM was made from.
    """
    if not dense:
        raise click.UsageError("Missing option '--dense', the only form so far.")
    path = backend().export_dense(slim, out, overwrite=overwrite, allow_nonfinite=allow_nonfinite)
    settings().written = path
    click.echo(f"wrote {path}")
