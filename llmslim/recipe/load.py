"""Read recipes: YAML in, a checked `Recipe` out, or every problem with its file, line and key."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from llmslim.errors import RecipeError

from .rule import Rule, Section, rule_class
from .schema import Recipe, key_text

MAX_BYTES = 1 << 20
"""A recipe is a page of text; anything larger is a mistake or an attack."""
_MAX_PARTS = 50_000
"""Keys, values and brackets. A rule for every projection of a large model takes 10,000."""
_MAX_VALUE = 10_000
"""Characters of one value; `1:1:1:…` is a number to YAML, and slow to read."""
_SHOWN = 200
"""Characters of one value or key that a message repeats at most."""

Path_ = tuple[str | int, ...]
Lines = dict[Path_, int]


def shipped_folder() -> Path:
    """Return the folder of shipped recipes: inside the installed package, or of a source tree."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Return every shipped recipe: name to path, sorted by name."""
    paths = {path.stem: path for path in shipped_folder().glob("*.yaml")}
    return dict(sorted(paths.items()))


def load_recipe(source: str | Path) -> Recipe:
    """Read a recipe file or a shipped recipe by its name; see `Recipe.load`.

    Raises:
        RecipeError: if there is no such recipe, or anything in it is wrong.
    """
    path = Path(source)
    if not os.path.isfile(path):  # noqa: PTH113  (Path.is_file raises on names that are too long)
        shipped = shipped_recipes()
        # A path to a shipped recipe works from any folder, as the README writes it.
        named = shipped.get(path.stem) if str(path.parent) in (".", "recipes") else None
        if named is None:
            close = _nearest(path.stem, shipped)
            raise RecipeError(
                f"{_short(str(source))}: no such recipe file, and no shipped recipe of that name; "
                f"shipped are {', '.join(shipped)}.{close}"
            )
        path = named
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8") if len(raw) <= MAX_BYTES else None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    if text is None:
        raise RecipeError(
            f"{path}: {path.stat().st_size:,} bytes; a recipe has at most {MAX_BYTES:,}."
        )
    data, lines = _parse(text, str(path))
    data.setdefault("name", path.stem)
    return _validate(data, str(path), lines)


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """Return a checked recipe from a dictionary shaped like a recipe file.

    Raises:
        RecipeError: if anything in it is wrong.
    """
    return _validate({"name": "recipe", **data}, "recipe", {})


def recipe_yaml(recipe: Recipe) -> str:
    """Return a recipe as YAML that reads back as the same recipe."""
    data = recipe.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def json_schema() -> str:
    """Return the JSON Schema of recipes, for editors."""
    return json.dumps(Recipe.model_json_schema(), indent=2)


def _parse(text: str, file: str) -> tuple[dict[str, Any], Lines]:
    """Return the YAML's data, and the line of every key in it.

    Raises:
        RecipeError: if it is not YAML, not a mapping, or has repeated keys or aliases.
    """
    try:
        _check_size(text, file)
        lines: Lines = {}
        repeated = list(_walk(yaml.compose(text, yaml.SafeLoader), (), lines))
        data = yaml.safe_load(text)
    except RecipeError:  # a ValueError, too
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        detail = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise RecipeError(f"{file}{line}: not valid YAML; {_short(detail)}.") from error
    except RecursionError as error:
        raise RecipeError(f"{file}: nested too deeply to be a recipe.") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # An integer of thousands of digits, a date that is none, `!!float ""`, `!!timestamp x`.
        raise RecipeError(f"{file}: not valid YAML; {_short(str(error))}.") from error
    if repeated:
        raise RecipeError(
            [f"{file}:{line} {key_text(path)}: given twice. Keep one." for path, line in repeated]
        )
    if not isinstance(data, dict):
        raise RecipeError(f"{file}: holds no keys; a recipe is a mapping such as `replace: [...]`.")
    return data, lines


def _check_size(text: str, file: str) -> None:
    """Refuse what would grow or take minutes, before anything is composed.

    Raises:
        RecipeError: if there are aliases, which nested grow without bound, or too many parts.
        YAMLError: if it is not YAML.
    """
    for parts, event in enumerate(yaml.parse(text, yaml.SafeLoader), 1):
        if isinstance(event, yaml.AliasEvent):
            raise RecipeError(f"{file}: a YAML alias (*name); recipes take none. Write it out.")
        if len(getattr(event, "value", "") or "") > _MAX_VALUE:
            raise RecipeError(f"{file}: a value of more than {_MAX_VALUE:,} characters.")
        if parts > _MAX_PARTS:
            raise RecipeError(f"{file}: more than {_MAX_PARTS:,} keys and values; not a recipe.")


def _walk(node: Node | None, path: Path_, lines: Lines) -> Iterator[tuple[Path_, int]]:
    """Note the line of every key below `node`; yield keys that stand twice."""
    if isinstance(node, MappingNode):
        seen = set()
        for key_node, value in node.value:
            key = key_node.value if isinstance(key_node, ScalarNode) else str(key_node)
            line = key_node.start_mark.line + 1
            if key in seen:
                yield (*path, key), line
            seen.add(key)
            lines[*path, key] = line
            yield from _walk(value, (*path, key), lines)
    elif isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            lines[*path, index] = value.start_mark.line + 1
            yield from _walk(value, (*path, index), lines)


def _validate(data: dict[Any, Any], file: str, lines: Lines) -> Recipe:
    """Check the data against the schema.

    Raises:
        RecipeError: with every problem found.
    """
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        # Only for its `where`: an empty recipe that knows the file and its lines.
        locator = Recipe(name="-")
        locator._file, locator._lines = file, lines
        found: dict[Path_, str] = {}
        for problem in error.errors():
            path = _yaml_path(problem["loc"], data)
            # Unions report once per branch; the first sentence per key is enough.
            found.setdefault(path, f"{locator.where(*path)}: {_sentence(problem, path, data)}")
        raise RecipeError(list(found.values())) from error
    recipe._file, recipe._lines = file, lines
    return recipe


def _yaml_path(loc: tuple[str | int, ...], data: Any) -> Path_:
    """Drop what pydantic adds to a location (names of union branches)."""
    path: list[str | int] = []
    for part in loc:
        if isinstance(data, dict):
            path.append(part)
            data = data.get(part)
        elif isinstance(data, list | tuple) and isinstance(part, int):
            path.append(part)
            data = data[part] if part < len(data) else None
    return tuple(path)


def _sentence(problem: Any, path: Path_, data: Any) -> str:
    if problem["type"] == "extra_forbidden":
        keys = _keys_at(path[:-1], data)
        close = _nearest(str(path[-1]), keys)
        return f"unknown key; allowed {', '.join(keys)}.{close}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = problem.get("input")
    shown = "" if isinstance(given, dict | Section) else f"{_short(repr(given))}; "
    end = "" if message.endswith("?") else "."
    return f"{shown}{message[0].lower()}{message[1:]}{end}"


def _keys_at(path: Path_, data: Any) -> list[str]:
    """Return the keys that the schema allows at a place in a recipe."""
    section: Any = Recipe
    for part in path:
        data = data[part]
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            section = next(_sections(annotation), section)
    if section is Rule:
        section = rule_class(data.get("structure"))
    return list(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _sections(argument)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name[:_SHOWN], list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""
