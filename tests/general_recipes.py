"""What the shipped recipes for any architecture leave of each, and why some save nothing.

Used by test_roles.py, and by benchmarks/architectures.py, which makes docs/architectures.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmslim import planning
from llmslim.errors import SlimError
from llmslim.recipe import Recipe

GENERAL = ("grouped-half", "grouped-third", "mlp-light", "mlp-half", "mlp-third")
"""Shipped recipes for any architecture."""
_NO_MLP = "it has no MLP; name its projections by `role: ssm`"
_APART = "a fit to text needs one list of decoder layers, with the MLPs in it"
NOT_PLANNED: dict[str, tuple[str, str]] = {
    "blt": ("mlp", _APART),
    "dbrx": ("", "its experts are flat parameters, multiplied in a way of their own"),
    "deepseek_v2": ("grouped", "its 1407 neurons share no divisor with its other sizes"),
    "falcon_mamba": ("", _NO_MLP),
    "hrm_text": ("mlp", _APART),
    "mamba": ("", _NO_MLP),
    "mamba2": ("", _NO_MLP),
    "xlm": ("mlp", _APART),
}
"""What general recipes save nothing of at the default size: how their names begin, and why."""


def general_recipes(model: Any, names: Iterable[str] = GENERAL) -> dict[str, float]:
    """Return what share of a model's weights, embeddings left out, each general recipe leaves.

    1.0 where one saves nothing, or is refused because the model lacks what it needs.
    """
    shares = {}
    for name in names:
        try:
            report = planning.plan(model, Recipe.load(name)).report()
            shares[name] = report.totals.kept_ratio
        except SlimError:
            shares[name] = 1.0
    return shares
