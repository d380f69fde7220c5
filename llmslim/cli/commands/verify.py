"""`llmslim verify`: check that a slim checkpoint is as it was written."""

from __future__ import annotations

import click

from llmslim.cli.settings import backend
from llmslim.errors import CheckpointError


@click.command()
@click.argument("slim")
def command(slim: str) -> None:
    """Check every file of SLIM against its manifest.

    Exits with status 1 if a file is missing, added or changed.
    """
    verification = backend().verify(slim)
    if not verification.ok:
        raise CheckpointError(verification.problems)
    click.echo(f"ok: {verification.files} files as written")
