"""Show scores and speeds, for `llmslim eval`, `llmslim bench` and `llmslim report`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llmslim.cli.output import console
from llmslim.errors import printable

if TYPE_CHECKING:
    from llmslim.report.scores import Estimate, Evaluation
    from llmslim.report.speeds import Benchmark


def show_evaluation(found: Evaluation) -> None:
    """Print the scores of a model: a few lines for each text, and one for each metric of a task."""
    for one in found.texts:
        click.echo(printable(f"{one.text}, {one.windows} windows of {one.length} tokens"))
        _line("perplexity", one.perplexity, 2)
        _line("dense model's", one.dense_perplexity, 2)
        _line("KL from it, nats", one.divergence, 4)
        _line("same top token, %", one.agreement, 1, 100)
    if found.texts:
        click.echo("In brackets: where the mean over such windows lies, with 95 % confidence.")
    for score in found.tasks:
        error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
        rows = "" if score.rows is None else f", {score.rows} rows"
        click.echo(printable(f"{score.task}, {score.metric}: {score.value:.4f}{error}{rows}"))


def show_benchmark(found: Benchmark) -> None:
    """Print speeds: a line for each figure of each batch."""
    from llmslim.report.bars import plain_table
    from llmslim.report.speeds import explanation, headline, speed_rows

    click.echo(printable(headline(found)))
    table = plain_table()
    names = ("dense", "slim", "ratio", "of the ideal") if found.dense else ("slim",)
    for number, name in enumerate(("batch", "measured", *names)):
        table.add_column(name, justify="left" if number == 1 else "right", no_wrap=True)
    for row in speed_rows(found):
        cells = (row.dense, row.slim, row.ratio, row.reached) if found.dense else (row.slim,)
        table.add_row(str(row.batch), row.name, *cells)
    console().print(table)
    for note in (*found.notes, explanation(found)):
        click.echo(printable(note))


def _line(name: str, estimate: Estimate | None, digits: int, factor: int = 1) -> None:
    if estimate is None:
        return
    text = f"  {name:<18} {factor * estimate.mean:>10.{digits}f}"
    if estimate.low is not None and estimate.high is not None:
        low, high = factor * estimate.low, factor * estimate.high
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    click.echo(text)
