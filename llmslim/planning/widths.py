"""Decide how many neurons each MLP is to have, and which field of the config holds it.

A width comes from the recipe's section `width`, the same for all, or from a rule (`structure:
width`, `neurons`, `auto`), which may differ from layer to layer. Where one field of the config
expresses what comes out, the model stays one of its own class; elsewhere every resized projection
becomes a site of structure `linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import Conv1D

from llmslim.anatomy.sites import Layers, Mlp, Site, find_mlps
from llmslim.editing.plans import MlpPlan
from llmslim.editing.resize import following_width, width_field
from llmslim.errors import TargetError
from llmslim.modeling.sizes import OptionError, exact_ratio
from llmslim.planning.rules import AUTO, init_of
from llmslim.recipe import Recipe, Rule
from llmslim.report.report import WIDTH

Problem = tuple[int, OptionError, str]
"""What is wrong with a rule: its index, the error, and the projection's name."""


@dataclass
class Widths:
    """What becomes of a model's MLPs."""

    mlps: list[MlpPlan] = field(default_factory=list)
    """Those that change their width."""
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Sizes (I, O) of their projections afterwards."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the text config that change."""
    resized: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Specs of projections that the config alone cannot express."""
    problems: list[Problem] = field(default_factory=list)
    """What is wrong with single rules."""


def plan_widths(
    model: Any,
    recipe: Recipe,
    layers: Layers,
    *,
    rule_of: Mapping[str, int],
    sites: Mapping[str, Site],
    stays: Callable[[int | None], bool],
    init: str | None,
) -> Widths:
    """Note every MLP that changes its width, by the section `width` or by a rule.

    Args:
        model: a causal language model.
        recipe: what to do.
        layers: the model's decoder layers.
        rule_of: index of the rule for every dense map that one matches, by name.
        sites: its dense maps by name.
        stays: whether a decoder layer stays.
        init: a method that takes the place of the recipe's.

    Raises:
        TargetError: if the section `width` finds no MLP.
    """
    plan = Widths()
    found = [mlp for mlp in find_mlps(model, layers) if stays(layers.index_of(mlp.name))]
    if recipe.width is not None and not found:
        raise TargetError(
            f"{recipe.where('width', 'intermediate_size')}: no MLP found in "
            f"{type(model).__name__} whose sizes fit each other and whose neurons nothing else "
            "depends on. Leave `width` out."
        )
    wanted, plan.problems = _all_planned(found, recipe, rule_of, init)
    plan.mlps = [each for each in wanted if each.width != each.mlp.width]
    for each in plan.mlps:
        mlp, hidden = each.mlp, sites[each.mlp.down].out_features
        for up in mlp.up:
            plan.sizes[up] = (hidden, each.width * (2 if mlp.fused else 1))
        plan.sizes[mlp.down] = (each.width, hidden)
    if not plan.mlps:
        return plan
    uniform = len(wanted) == len(found) and len({each.width for each in wanted}) == 1
    follow = [following_width(model, mlp) for mlp in found] if uniform else []
    change = width_field(model, follow, plan.mlps[0].width) if uniform else None
    if change is not None:
        plan.changes = change
        known = {mlp.name: mlp for mlp in follow}
        plan.mlps = [replace(each, mlp=known[each.mlp.name]) for each in plan.mlps]
        return plan
    for name, size in plan.sizes.items():
        plan.resized[name] = _dense_spec(model.get_submodule(name), size, bias=sites[name].bias)
    return plan


def _dense_spec(module: Any, size: tuple[int, int], *, bias: bool) -> dict[str, Any]:
    """Return the spec of a dense map of another size (I, O) in the place of a module."""
    return {
        "structure": "conv1d" if isinstance(module, Conv1D) else "linear",
        "in_features": size[0],
        "out_features": size[1],
        "bias": bias,
    }


def narrows(rule: Rule) -> bool:
    """Return whether a rule changes the number of neurons of the MLPs it matches."""
    return rule.structure in (WIDTH, AUTO) or rule.neurons is not None


def _all_planned(
    mlps: Iterable[Mlp], recipe: Recipe, rule_of: Mapping[str, int], init: str | None
) -> tuple[list[MlpPlan], list[Problem]]:
    """Return those MLPs that are given a width, and what is wrong with single rules."""
    planned: list[MlpPlan] = []
    problems: list[Problem] = []
    for mlp in mlps:
        index = rule_of.get(mlp.down)
        try:
            each = _planned(mlp, recipe, index, rule_of, init)
        except OptionError as error:
            assert index is not None
            problems.append((index, error, mlp.down))
        else:
            planned += [] if each is None else [each]
    return planned, problems


def _planned(
    mlp: Mlp, recipe: Recipe, index: int | None, rule_of: Mapping[str, int], init: str | None
) -> MlpPlan | None:
    """Return an MLP with the width that it is given, None where it is given none.

    Raises:
        OptionError: if the rule that gives it one cannot.
    """
    rule = None if index is None else recipe.replace[index]
    if rule is None or index is None or not narrows(rule):
        if recipe.width is None:
            return None
        return MlpPlan(mlp, recipe.width.intermediate_size, init or recipe.init)
    if recipe.width is not None:
        raise OptionError("", "the section `width` sets the width already")
    if {rule_of.get(up) for up in mlp.up} != {index}:
        if rule.structure == AUTO:
            return None
        raise OptionError("", f"the rule must match all of {', '.join((*mlp.up, mlp.down))}")
    share = _share_of_neurons(recipe, rule)
    assert share is not None
    return MlpPlan(mlp, max(1, int(mlp.width * exact_ratio(share))), init_of(recipe, index, init))


def _share_of_neurons(recipe: Recipe, rule: Rule) -> float | None:
    if rule.structure == AUTO:
        return recipe.budget
    return rule.options()["keep_ratio"] if rule.structure == WIDTH else rule.neurons
