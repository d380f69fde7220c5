"""`llmslim verify`: check that a slim checkpoint is as it was written."""

from __future__ import annotations

from dataclasses import asdict

import click

from llmslim.cli.output import json_option, shows, write_json
from llmslim.cli.settings import backend
from llmslim.errors import CheckpointError


@click.command()
@click.argument("slim")
@json_option
def command(slim: str, json_target: str | None) -> None:
    """Check every file of SLIM against its manifest.

    Exits with status 1 if a file is missing, added or changed.
    """
    verification = backend().verify(slim)
    write_json({**asdict(verification), "ok": verification.ok}, json_target)
    if not verification.ok:
        raise CheckpointError(verification.problems)
    if shows(json_target):
        click.echo(f"ok: {verification.files} files as written")
