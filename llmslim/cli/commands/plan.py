"""`llmslim plan`: show what a recipe would do."""

from __future__ import annotations

from fractions import Fraction

import click

from llmslim.cli.output import json_option, show_cost, show_report, shows, write_json
from llmslim.cli.settings import backend


def read_ratio(ctx: click.Context, param: click.Parameter, value: str | None) -> Fraction | None:
    """Read a share exactly, as a float would not.

    Raises:
        click.BadParameter: if it is not above 0 and at most 1.
    """
    if value is None:
        return None
    try:
        ratio = Fraction(value.replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        ratio = Fraction(0)
    if not 0 < ratio <= 1:
        raise click.BadParameter(
            f"{value!r}; a number above 0 and at most 1 is needed, such as 0.5 or 1/2.", ctx, param
        )
    return ratio


@click.command()
@click.argument("model")
@click.option("-r", "--recipe", required=True, help="Name of a shipped recipe, or a recipe file.")
@json_option
@click.option("--full", is_flag=True, help="Show every module, and a bar for every layer.")
@click.option("--init", metavar="NAME", help="Method of fitting, in place of the recipe's.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of MODEL on the hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run the modeling code in MODEL.")
@click.option(
    "--fail-under",
    metavar="RATIO",
    callback=read_ratio,
    help="Exit with status 1 if less than this share of the non-embedding parameters is saved.",
)
def command(
    model: str,
    recipe: str,
    json_target: str | None,
    full: bool,
    init: str | None,
    revision: str | None,
    trust_remote_code: bool,
    fail_under: Fraction | None,
) -> None:
    """Show what a recipe would do to MODEL.

    MODEL is a hub id, a folder (a config.json alone is enough), or a .gguf file. No weights are
    read, and nothing is changed.
    """
    from llmslim.recipe import Recipe

    read = Recipe.load(recipe)  # its errors appear before the slow import of torch
    model = model if revision is None else f"{model}@{revision}"
    made = backend().plan(model, read, init=init, trust_remote_code=trust_remote_code)
    report = made.report()
    if shows(json_target):
        show_report(report, full=full)
        show_cost(made)
    write_json(report.to_dict(), json_target)
    if fail_under is not None:
        totals = report.totals
        saved = totals.non_embedding_before - totals.non_embedding_after
        if saved < fail_under * totals.non_embedding_before:
            raise click.ClickException(
                f"saves {1 - totals.kept_ratio:.2%} of the non-embedding parameters; --fail-under "
                f"requires at least {float(fail_under):.2%}."
            )
