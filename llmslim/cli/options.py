"""Options of a command, made from the fields of a dataclass of `llmslim.options`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from llmslim.options import flags_of

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def options_from(options: type) -> Decorator:
    """Give a command an option for each field of a dataclass.

    Args:
        options: a dataclass whose docstring has a section `Attributes`; metadata of a field may
            have `flags` (empty: no option), `metavar` and `multiple`.
    """
    hints, help_of = get_type_hints(options), _described(options)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for field in reversed(fields(options)):
            if flags := flags_of(field):
                kind = {**_kind(hints[field.name]), "default": field.default, "show_default": True}
                kind |= {k: v for k, v in field.metadata.items() if k in ("metavar", "multiple")}
                text = help_of[field.name]
                command = click.option(*flags, field.name, help=text, **kind)(command)
        return command

    return decorate


def _described(options: type) -> dict[str, str]:
    """Return the text of each name in a docstring's section `Attributes`, on one line."""
    text = inspect.getdoc(options) or ""
    found = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", text.partition("Attributes:\n")[2], re.M)
    return {name: " ".join(lines.split()) for name, lines in found}


def _kind(hint: Any) -> dict[str, Any]:
    """Return click's options for a value of a type; text by default."""
    kinds = get_args(hint) or (hint,)
    for one in () if str in kinds else kinds:
        if one is bool:
            return {"is_flag": True}
        if one in (int, float):
            return {"type": one}
        if get_origin(one) is Literal:
            return {"type": click.Choice(get_args(one))}
    if Mapping in [get_origin(one) for one in kinds] and str not in kinds:
        return {"multiple": True, "metavar": "KEY=VALUE", "callback": _read_pairs}
    return {}


def _read_pairs(
    _ctx: click.Context, _param: click.Parameter, pairs: tuple[str, ...]
) -> dict[str, Any]:
    """Read KEY=VALUE pairs; values as in YAML."""
    import yaml

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"{pair!r}; KEY=VALUE is needed, such as warmup=0.1.")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise click.BadParameter(f"{pair!r}; the value is not YAML.") from error
    return found
