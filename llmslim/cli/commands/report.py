"""`llmslim report`: the report of a slim checkpoint, in any format."""

from __future__ import annotations

from pathlib import Path

import click

from llmslim.cli.evaluation import show_benchmark, show_evaluation
from llmslim.cli.healing import show_healing
from llmslim.cli.output import json_option, out_argument, show_report, write_json, write_out
from llmslim.report import FORMATS


@click.command()
@click.argument("slim")
@click.option(
    "-f",
    "--format",
    "format_name",
    type=click.Choice(list(FORMATS)),
    default="text",
    show_default=True,
    help="Format of the report.",
)
@click.option("-o", "--out", metavar="FILE", help="Write to this file instead of stdout.")
@click.option(
    "--full",
    is_flag=True,
    help="Show every module; in text, also a bar for every layer.",
)
@json_option
@out_argument
def command(
    slim: str, format_name: str, out: str | None, full: bool, json_target: str | None
) -> None:
    """Show what was saved in SLIM, module by module.

    A healed model's losses and answers follow, and what `llmslim eval` and `llmslim bench` found.
    With --format html all of it becomes one page that needs no network: llmslim report SLIM
    --format html -o report.html. SLIM is a folder that `llmslim convert` wrote, or a report file of
    `llmslim plan --json`.
    """
    from llmslim.report import card, healed, render
    from llmslim.report.read import read_report
    from llmslim.storage import RECIPE

    read = read_report(slim)
    report, healing = read.report, read.healing
    commands = read.commands(str(Path(slim) / RECIPE))
    write_json(read.data, json_target)
    if json_target == "-" and out is None:
        return
    if format_name == "text" and out is None:
        show_report(report, full=full)
        if healing:
            show_healing(healing)
        if read.scores is not None:
            click.echo()
            show_evaluation(read.scores)
        for speeds in read.benchmarks:
            click.echo()
            show_benchmark(speeds)
        if commands:
            click.echo("\nmake it again\n  " + "\n  ".join(commands))
        return
    if format_name == "html":
        from llmslim.report.page.html import report_page

        write_out(report_page(read, full=full), out or "-")
        return
    text = render(report, format_name, full=full)
    if healing and format_name == "md":
        text = f"{text}\n{healed.section(healing)}"
    if commands and format_name == "md":
        text = f"{text}\n{card.again(commands)}"
    write_out(text, out or "-")
