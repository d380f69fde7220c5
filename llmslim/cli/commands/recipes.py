"""`llmslim recipes`: what recipes there are, and what one may say."""

from __future__ import annotations

import difflib

import click

from llmslim.cli.output import console
from llmslim.errors import RecipeError


@click.command()
@click.argument("name", required=False)
@click.option("--schema", is_flag=True, help="Print the JSON Schema of recipes, for editors.")
def command(name: str | None, schema: bool) -> None:
    """List the shipped recipes, or print the one called NAME.

    To change one: `llmslim recipes NAME > my.yaml`, edit, and give `--recipe my.yaml`.
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
                f"{name}: no shipped recipe of that name; shipped are {', '.join(shipped)}."
                f"{f' Did you mean {close[0]}?' if close else ''}"
            )
        click.echo(shipped[name].read_text(encoding="utf-8"), nl=False)
    else:
        _list()


def _list() -> None:
    from rich.table import Table

    from llmslim.recipe import Recipe, shipped_recipes

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it does")
    for name, path in shipped_recipes().items():
        table.add_row(name, Recipe.load(path).description)
    console().print(table)
