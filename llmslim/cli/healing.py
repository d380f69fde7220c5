"""Heal a model and show what became of it: `llmslim heal`, and `llmslim convert --heal`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from llmslim.cli.output import console, progress
from llmslim.cli.settings import backend, settings
from llmslim.errors import printable

_NEXT = """
wrote {path}

what next
  llmslim generate {quoted} "What is the capital of France?"
  llmslim verify {quoted}
"""


def heal_and_show(model: str | Path, **options: Any) -> None:
    """Heal with a progress bar, then print losses, notes and answers.

    Args:
        model: a checkpoint.
        options: fields of `HealOptions`.
    """
    api = backend()
    try:
        with progress() as moved:
            report = api.heal(model, **options, progress=moved)
    except KeyboardInterrupt:
        click.echo(
            "\nIf it had begun to train: the last state is kept, continue with --resume.", err=True
        )
        raise
    from llmslim.healing.distributed import processes

    settings().written = report.path
    if processes().is_main_process:
        show_healing(report.to_dict())
        path = str(report.path)
        click.echo(_NEXT.format(path=path, quoted=shlex.quote(path)), nl=False)


def plan_and_show(model: str | Path, **options: Any) -> None:
    """Print what a healing would do, and the memory it would take.

    Args:
        model: a checkpoint.
        options: fields of `HealOptions`.
    """
    api = backend()
    with progress() as moved:
        found = api.plan_heal(model, **options, progress=moved)
    _print(_table(found.facts(), found.notes))
    click.echo("\ndry run: nothing was trained or written")


def _table(facts: list[tuple[str, str]], notes: Sequence[str]) -> list[str]:
    width = max(len(name) for name, _ in facts)
    return [*(f"{name:<{width}}  {value}" for name, value in facts), *(f"- {n}" for n in notes)]


def _print(lines: list[str]) -> None:
    out = console()
    for line in lines:
        out.print(printable(line), soft_wrap=True)


def show_healing(done: Mapping[str, Any]) -> None:
    """Print losses, notes and answers of a healing.

    Args:
        done: what `HealReport.to_dict` gives.
    """
    from llmslim.report import healed

    lines = ["", "healing", *_table(healed.facts(done), done["notes"])]
    for answer in done["answers"]:
        lines += ["", f"user: {answer['prompt']}"]
        # One line each: answers break lines where they please.
        lines += [f"  {when}: {' '.join(answer[when].split())}" for when in ("before", "after")]
    _print(lines)
