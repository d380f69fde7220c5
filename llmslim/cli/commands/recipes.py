"""`llmslim recipes`: list or print the shipped recipes."""

from __future__ import annotations

import difflib

import click

from llmslim.cli.output import console
from llmslim.errors import RecipeError


@click.command()
@click.argument("name", required=False)
@click.option("--schema", is_flag=True, help="Print the JSON Schema of recipes, for editors.")
def command(name: str | None, schema: bool) -> None:
    """List the shipped recipes, or print the recipe NAME.

    To change a recipe: `llmslim recipes NAME > my.yaml`, edit it, and pass `--recipe my.yaml`.
    """
    from llmslim.recipe import json_schema, shipped_recipes

    if schema:
        if name is not None:
            raise click.UsageError("--schema describes all recipes; leave NAME out.")
        click.echo(json_schema())
    elif name is not None:
        shipped = shipped_recipes()
        if name not in shipped:
            close = difflib.get_close_matches(name, shipped, n=1)
            raise RecipeError(
                f"{name}: not a shipped recipe; allowed are {', '.join(shipped)}."
                f"{f' Did you mean {close[0]}?' if close else ''}"
            )
        click.echo(shipped[name].read_text(encoding="utf-8"), nl=False)
    else:
        _list()


def _list() -> None:
    from llmslim.recipe import Recipe, shipped_recipes
    from llmslim.report.bars import plain_table

    table = plain_table()
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it does")
    for name, path in shipped_recipes().items():
        table.add_row(name, Recipe.load(path).description)
    console().print(table)
