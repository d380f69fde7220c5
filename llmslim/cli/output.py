"""How commands print: reports and progress through rich, output for machines unchanged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

LINE_SECONDS = 5
"""Time between two lines of progress where there is no terminal."""

if TYPE_CHECKING:
    from rich.console import Console

    from llmslim.editing.plans import Plan
    from llmslim.report.report import Report


def console(*, err: bool = False) -> Console:
    """Return a console on stdout or stderr; markup off: names may hold brackets."""
    from rich.console import Console

    return Console(stderr=err, markup=False, highlight=False, emoji=False)


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


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """Show progress on stderr, as a bar or, where that is no terminal, as a line now and then.

    Yields:
        The function that updates it.
    """
    from rich import progress as rich_bar

    err = console(err=True)
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
