"""Match rules against module names: shell globs, where `*` also crosses dots."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from .schema import Recipe


def first_rule(recipe: Recipe, name: str) -> int | None:
    """Return the index of the first rule of `recipe.replace` that matches, None if none does.

    Example:
        >>> recipe = Recipe(name="r", replace=[{"match": "*.mlp.*", "keep": True}])
        >>> first_rule(recipe, "model.layers.0.mlp.up_proj"), first_rule(recipe, "lm_head")
        (0, None)
    """
    for index, rule in enumerate(recipe.replace):
        if any(fnmatchcase(name, glob) for glob in rule.globs):
            return index
    return None


def close_names(globs: Iterable[str], names: Iterable[str], count: int = 3) -> list[str]:
    """Return the names most like any of the globs, best first."""
    names = list(names)
    scores = {
        name: max(difflib.SequenceMatcher(None, glob.strip("*."), name).ratio() for glob in globs)
        for name in names
    }
    return sorted(names, key=lambda name: -scores[name])[:count]
