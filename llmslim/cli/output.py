"""How commands print: reports and progress through rich, output for machines unchanged."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmslim.cli.settings import settings
from llmslim.progress import quietly

LINE_SECONDS = 5
"""Time between two lines of progress where there is no terminal."""

_PIPE_WIDTH = 10_000

if TYPE_CHECKING:
    from rich.console import Console

    from llmslim.editing.plans import Plan
    from llmslim.report.report import Report


def console(*, err: bool = False) -> Console:
    """Return a console on stdout or stderr; markup off: names may hold brackets."""
    from rich.console import Console

    found = Console(stderr=err, markup=False, highlight=False, emoji=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = _PIPE_WIDTH  # a row stays a line
    return found


def show_report(report: Report, *, full: bool = False, bars: bool | None = None) -> None:
    """Print a report for people; options as of `TextView`."""
    from llmslim.report.text import TextView

    console().print(TextView(report, full=full, bars=bars))


def show_cost(plan: Plan, device: str | None = None) -> None:
    """Print the time and memory of a fit to calibration text, if the plan has one."""
    from llmslim.anatomy.device import device_named
    from llmslim.fitting.cost import fitting_cost, speed
    from llmslim.report import wording

    cost, where = fitting_cost(plan), device_named(device)
    if cost is not None:
        minutes = max(1, round(cost.flops / speed(where) / 60))
        click.echo(
            f"\nfitting to {cost.tokens:,} tokens: about {wording.size(cost.memory)} of memory "
            f"beside the model and {minutes:,} min on this machine ({where}), within a factor of 2"
        )


def write_out(text: str, target: str) -> None:
    """Write text to a file, or to stdout where the target is `-`.

    Raises:
        click.FileError: if the file cannot be written.
    """
    if target == "-":
        click.echo(text, nl=False)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.FileError(target, error.strerror) from error


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the option --json, whose value it gets as `json_target`."""
    text = "Write JSON too; with - JSON is all that appears on stdout."
    return click.option("--json", "json_target", metavar="FILE", help=text)(command)


def write_json(data: Any, target: str | None) -> None:
    """Write the value of a command where `--json` says, if it is given.

    Raises:
        click.FileError: if the file cannot be written.
    """
    if target is not None:
        write_out(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n", target)


def shows(json_target: str | None) -> bool:
    """Return whether to print for people: not with -q, and not beside JSON on stdout."""
    return json_target != "-" and not settings().quiet


def out_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command take its option --out as a last argument too."""

    @functools.wraps(command)
    def call(*, out: Any, out_given: str | None, **keywords: Any) -> Any:
        if out is not None and out_given is not None:
            raise click.UsageError(f"OUT is {out_given!r} and --out {str(out)!r}; give one.")
        return command(out=out if out_given is None else out_given, **keywords)

    return click.argument("out_given", metavar="[OUT]", required=False)(call)


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """Show progress on stderr, as a bar or, where that is no terminal, as a line now and then.

    Yields:
        The function that updates it.
    """
    from rich import progress as rich_bar

    err = console(err=True)
    if settings().quiet:
        yield quietly
        return
    if not err.is_terminal:
        yield _lines()
        return
    columns = (
        rich_bar.TextColumn("{task.description}", markup=False),
        rich_bar.BarColumn(),
        rich_bar.MofNCompleteColumn(),
        rich_bar.TimeRemainingColumn(),
    )
    with rich_bar.Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("reading the model", total=None)

        def move(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield move


def _lines() -> Callable[[int, int, str], None]:
    """Return a function that prints progress as a line every few seconds."""
    start = printed = time.monotonic()

    def move(done: int, total: int, what: str) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed >= LINE_SECONDS:
            printed = now
            count = f"{done:,} of {total:,}, " if total else ""
            click.echo(f"  {now - start:.0f} s: {count}{what}", err=True)

    return move
