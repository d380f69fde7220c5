"""`llmslim compare`: several slim models beside each other."""

from __future__ import annotations

import click

from llmslim.cli.output import json_option, write_out


@click.command()
@click.argument("models", metavar="SLIM SLIM...", nargs=-1, required=True)
@click.option(
    "-f",
    "--format",
    "format_name",
    type=click.Choice(["text", "json", "html"]),
    default="text",
    show_default=True,
    help="Format of the comparison.",
)
@click.option("-o", "--out", metavar="FILE", help="Write to this file instead of stdout.")
@json_option
def command(
    models: tuple[str, ...], format_name: str, out: str | None, json_target: str | None
) -> None:
    """Show several slim models side by side, with the dense model as the one to beat.

    Sizes come from their reports, quality from healing and from `llmslim eval`: evaluate each on
    the same text for rows that can be compared. --format html also draws loss over size.
    """
    from llmslim.report.page.comparison import compare, render_comparison
    from llmslim.report.read import read_report

    found = compare([read_report(model) for model in models])
    if json_target is not None:
        write_out(render_comparison(found, "json"), json_target)
    if json_target != "-" or out is not None:
        write_out(render_comparison(found, format_name), out or "-")
