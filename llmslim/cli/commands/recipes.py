"""`llmslim recipes`: list or print the shipped recipes."""

from __future__ import annotations

import difflib

import click

from llmslim.cli.output import console, json_option, write_json
from llmslim.errors import RecipeError


@click.command()
@click.argument("name", required=False)
@click.option("--schema", is_flag=True, help="Print the JSON Schema of recipes, for editors.")
@json_option
def command(name: str | None, schema: bool, json_target: str | None) -> None:
    """List the shipped recipes, or print the recipe NAME.

    To change a recipe: `llmslim recipes NAME > my.yaml`, edit it, and pass `--recipe my.yaml`.
    """
    from llmslim.recipe import Recipe, json_schema, shipped_recipes

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
        if json_target != "-":
            click.echo(shipped[name].read_text(encoding="utf-8"), nl=False)
        write_json(Recipe.load(name).model_dump(mode="json", exclude_none=True), json_target)
    else:
        known = {name: Recipe.load(path).description for name, path in shipped_recipes().items()}
        if json_target != "-":
            _list(known)
        write_json(known, json_target)


def _list(known: dict[str, str]) -> None:
    from llmslim.report.bars import plain_table

    table = plain_table()
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it does")
    for name, description in known.items():
        table.add_row(name, description)
    console().print(table)
