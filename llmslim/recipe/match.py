"""Match rules against projections: by role, and by shell globs, where `*` also crosses dots."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from .schema import Recipe


def first_rule(recipe: Recipe, name: str, role: str = "") -> int | None:
    """Return the index of the first rule of `recipe.replace` that matches, None if none does.

    Args:
        recipe: the recipe.
        name: dotted name of a projection.
        role: what it is in its decoder layer; empty for none.

    Example:
        >>> recipe = Recipe(name="r", replace=[{"role": "mlp", "keep": True}])
        >>> first_rule(recipe, "model.layers.0.mlp.up_proj", "mlp.up"), first_rule(recipe, "head")
        (0, None)
    """
    for index, rule in enumerate(recipe.replace):
        if rule.is_for(role) and any(fnmatchcase(name, glob) for glob in rule.globs):
            return index
    return None


def rules_by_name(recipe: Recipe, roles: Mapping[str, str]) -> dict[str, int]:
    """Return the index of the rule for every projection that one matches.

    Args:
        recipe: the recipe.
        roles: the role of every projection by name, empty where it has none.
    """
    found = {name: first_rule(recipe, name, role) for name, role in roles.items()}
    return {name: index for name, index in found.items() if index is not None}


def close_names(globs: Sequence[str], names: Iterable[str], count: int = 3) -> list[str]:
    """Return the names most like any of the globs, best first, one of each kind.

    Names that differ by their layer number alone are of one kind; the first stands for all.
    """
    first_of_kind: dict[str, str] = {}
    for name in names:
        first_of_kind.setdefault(re.sub(r"\d+", "N", name), name)

    def likeness(name: str) -> float:
        pieces = [glob.strip("*.") for glob in globs]
        return max(difflib.SequenceMatcher(None, piece, name).ratio() for piece in pieces)

    return sorted(first_of_kind.values(), key=likeness, reverse=True)[:count]
