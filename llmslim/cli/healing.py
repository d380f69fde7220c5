"""Heal a model and show the result, for `llmslim heal` and `llmslim convert --heal`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmslim.cli.output import progress, shows
from llmslim.cli.settings import backend, settings
from llmslim.errors import printable

if TYPE_CHECKING:
    from llmslim.healing import HealReport
    from llmslim.healing.plan import HealingPlan

_NEXT = """
wrote {path}

what next
  llmslim generate {quoted} "What is the capital of France?"
  llmslim verify {quoted}
"""


def heal_and_show(model: str | Path, json_target: str | None, **options: Any) -> HealReport | None:
    """Heal a checkpoint with a progress bar, then print losses, notes and answers.

    Returns:
        The result; None in processes that are not the main one.
    """
    try:
        with progress() as moved:
            report: HealReport = backend().heal(model, **options, progress=moved)
    except KeyboardInterrupt:
        click.echo("\nIf training had begun, continue from its last state with --resume.", err=True)
        raise
    from llmslim.healing.distributed import processes

    settings().written = report.path
    if not processes().is_main_process:
        return None
    if shows(json_target):
        show_healing(report.to_dict())
        path = str(report.path)
        click.echo(_NEXT.format(path=path, quoted=shlex.quote(path)), nl=False)
    return report


def as_data(report: HealReport) -> dict[str, Any]:
    """Return a result as JSON values, with the folder that it was written to."""
    return {"path": str(report.path), **report.to_dict()}


def plan_and_show(model: str | Path, json_target: str | None, **options: Any) -> HealingPlan:
    """Print and return what a healing would do, and the memory that it would take."""
    with progress() as moved:
        found: HealingPlan = backend().plan_heal(model, **options, progress=moved)
    if shows(json_target):
        _print(found.facts(), found.notes)
        click.echo("\ndry run: nothing was trained or written")
    return found


def _print(facts: list[tuple[str, str]], notes: Sequence[str]) -> None:
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        click.echo(printable(f"{name:<{width}}  {value}"))
    for note in notes:
        click.echo(printable(f"- {note}"))


def show_healing(done: Mapping[str, Any]) -> None:
    """Print losses, notes and answers of a healing, from its `HealReport.to_dict`."""
    from llmslim.report import healed

    click.echo("\nhealing")
    _print(healed.facts(done), done["notes"])
    for answer in done["answers"]:
        click.echo(printable(f"\nuser: {answer['prompt']}", lines=True))
        for when in ("before", "after"):  # one line each: answers may contain line breaks
            click.echo(printable(f"  {when}: {' '.join(answer[when].split())}"))
