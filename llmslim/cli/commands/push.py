"""`llmslim push`: publish a checkpoint on the hub."""

from __future__ import annotations

from pathlib import Path

import click

from llmslim.cli.output import json_option, shows, write_json
from llmslim.cli.settings import backend


@click.command()
@click.argument("slim")
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="If the repository is made, make it private.")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to; made where needed.")
@click.option("--dry-run", is_flag=True, help="Only show what would be uploaded.")
@json_option
def command(
    slim: str,
    repo: str,
    private: bool,
    revision: str | None,
    dry_run: bool,
    json_target: str | None,
) -> None:
    """Upload the checkpoint SLIM to the repository OWNER/NAME on the hub, in one commit.

    SLIM is checked against its manifest first. Card, report, recipe and manifest go with the
    weights, and scores that `llmslim eval` has kept stand in the card. Log in with `hf auth login`.
    """
    if not dry_run:
        address = backend().push(slim, repo, private=private, revision=revision)
        if shows(json_target):
            click.echo(f"pushed to {address}")
        write_json({"address": address}, json_target)
        return
    from llmslim.export import plan_upload
    from llmslim.report import wording

    upload = plan_upload(Path(slim), repo)
    names = sorted(upload.files)
    if shows(json_target):
        for name in names:
            click.echo(name)
        click.echo(f"\n{len(names)} files, {wording.size(upload.bytes)}")
        click.echo("dry run: nothing was uploaded")
    write_json({"files": names, "bytes": upload.bytes}, json_target)
