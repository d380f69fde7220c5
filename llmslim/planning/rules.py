"""Check each rule of a recipe: its method, and which projections it matches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmslim.errors import RecipeError, SlimError, TargetError
from llmslim.init import method_named
from llmslim.recipe import ROLES, Recipe, close_names, rules_by_name
from llmslim.report.report import WIDTH

AUTO = "auto"
"""To be chosen by measurement, see `allocation`; until then a plan spreads the budget evenly."""


@dataclass
class Findings:
    """What is wrong with a recipe's rules, and what a reader of the report must know."""

    errors: list[SlimError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def init_of(recipe: Recipe, index: int, init: str | None) -> str:
    """Return the name of the method that fills the blocks of one rule.

    Args:
        recipe: the recipe.
        index: the rule.
        init: the caller's method in place of the recipe's, if any.
    """
    rule = recipe.replace[index]
    # What is chosen by measurement has activations to be fitted to.
    measured = rule.structure == AUTO and "init" not in recipe.model_fields_set
    return init or rule.init or ("least_squares" if measured else recipe.init)


def check_rules(recipe: Recipe, roles: Mapping[str, str], model: str, init: str | None) -> Findings:
    """Check every rule against the projections it could match.

    Args:
        recipe: the recipe.
        roles: role of every dense map of the model by name, empty where it has none.
        model: the model's class, for messages.
        init: the caller's method in place of the recipe's.

    Returns:
        All problems found; sizes are not looked at here.
    """
    found = Findings()
    matched = Counter(rules_by_name(recipe, roles).values())
    for index, rule in enumerate(recipe.replace):
        if not matched[index]:
            _explain_no_match(recipe, index, roles, model, found)
        if rule.structure is not None:
            _check_init(recipe, index, init, found)
        if rule.structure in (WIDTH, AUTO) and rule.neurons is not None:
            sentence = f"not an option of {rule.structure}, which sets the neurons itself."
            found.errors.append(recipe.problem(("replace", index, "neurons"), sentence))
    return found


def _check_init(recipe: Recipe, index: int, init: str | None, found: Findings) -> None:
    """Refuse a method that does not exist; the recipe's own is reported once."""
    own = recipe.replace[index].init is not None and init is None
    where = recipe.where(*(("replace", index, "init") if own else ("init",)))
    try:
        method_named(init_of(recipe, index, init))
    except RecipeError as error:
        problem = RecipeError(f"{'--init' if init else where}: {error}")
        if str(problem) not in map(str, found.errors):
            found.errors.append(problem)


def _explain_no_match(
    recipe: Recipe, index: int, roles: Mapping[str, str], model: str, found: Findings
) -> None:
    """Report a rule that matches nothing, or only what earlier rules have taken."""
    rule = recipe.replace[index]
    alone = recipe.model_copy(update={"replace": (rule,)})
    taken = list(rules_by_name(alone, roles))
    if taken:
        earlier = rules_by_name(recipe, roles)[taken[0]]
        found.notes.append(
            f"{recipe.where('replace', index)}: all {len(taken)} projections it matches are taken "
            f"by replace[{earlier}] above it."
        )
        return
    fitting = [name for name, role in roles.items() if rule.is_for(role)]
    if rule.role is not None and not fitting:
        key, given = "role", ", ".join(rule.role)
        known = [role for role in ROLES if role in roles.values()]
        detail = (
            f"it has {', '.join(known)}. Name one of those"
            if known
            else "none has one. Use `match`"
        )
    else:
        key, given = "match", ", ".join(rule.globs)
        close = ", ".join(close_names(rule.globs, fitting))
        detail = f"closest are {close}" if close else "it has no dense projection left"
    of_role = f" with role {', '.join(rule.role)}" if rule.role and key == "match" else ""
    where = recipe.where("replace", index, key)
    found.errors.append(
        TargetError(f"{where}: {given} matches no projection of {model}{of_role}; {detail}.")
    )
