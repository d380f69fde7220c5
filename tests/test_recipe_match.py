"""Matching rules against module names."""

from __future__ import annotations

import pytest

from llmslim.recipe import Recipe, close_names, first_rule, rules_by_name
from llmslim.recipe.roles import plays


def recipe_of(*globs: str | list[str]) -> Recipe:
    return Recipe.of({"replace": [{"match": glob, "keep": True} for glob in globs]})


@pytest.mark.parametrize(
    ("glob", "name", "matches"),
    [
        ("*.mlp.*", "model.layers.0.mlp.up_proj", True),
        ("*.mlp.*", "model.layers.0.mlp.experts.3.up_proj", True),  # a star crosses dots
        ("*.mlp.*", "mlp.up_proj", False),  # something must stand before the dot
        ("model.layers.?.mlp.up_proj", "model.layers.10.mlp.up_proj", False),
        ("*.fc[12]", "model.decoder.layers.0.fc1", True),
        ("*.fc[12]", "model.decoder.layers.0.fc3", False),
        ("*.UP_proj", "model.layers.0.mlp.up_proj", False),  # the case counts
        ("up_proj", "model.layers.0.mlp.up_proj", False),  # the whole name, not a part
    ],
)
def test_a_glob_matches_the_whole_name(glob, name, matches):
    assert (first_rule(recipe_of(glob), name) == 0) is matches


def test_the_first_rule_that_matches_wins():
    recipe = recipe_of("*.layers.0.*", ["*.none", "*.mlp.*"], "*")
    assert first_rule(recipe, "model.layers.0.mlp.up_proj") == 0
    assert first_rule(recipe, "model.layers.1.mlp.up_proj") == 1
    assert first_rule(recipe, "lm_head") == 2
    assert first_rule(recipe_of("*.mlp.*"), "lm_head") is None


@pytest.mark.parametrize(
    ("wanted", "role", "matches"),
    [
        ("mlp", "mlp.up", True),  # a whole has its parts
        ("mlp", "mlp", True),
        ("mlp.up", "mlp", False),
        ("mlp.up", "mlp.gate_up", False),
        ("experts", "shared_experts.up", False),
        (["mlp", "attention.q"], "attention.q", True),
        ("mlp", "", False),
    ],
)
def test_a_role_matches_itself_and_its_parts(wanted, role, matches):
    recipe = Recipe.of({"replace": [{"role": wanted, "keep": True}]})
    assert (first_rule(recipe, "any.name", role) == 0) is matches


def test_a_role_and_a_glob_must_both_hold():
    recipe = Recipe.of({"replace": [{"role": "mlp", "match": "*.0.*", "keep": True}]})
    roles = {"l.0.up": "mlp.up", "l.1.up": "mlp.up", "l.0.q": "attention.q", "l.0.x": ""}
    assert rules_by_name(recipe, roles) == {"l.0.up": 0}


def test_close_names_come_best_first():
    names = ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"]
    assert close_names(["*.mpl.up_proj"], names)[0] == "model.layers.0.mlp.up_proj"
    assert len(close_names(["*.mpl.up_proj"], names, count=2)) == 2
    assert close_names(["*.q_prj", "*.lm_haed"], names)[0] == "lm_head"


def test_a_role_means_itself_and_its_parts_and_no_longer_name():
    assert plays("mlp.up", "mlp")
    assert plays("attention.q", "attention.q")
    assert not plays("attention.qkv", "attention.q")
    assert not plays("mlp", "mlp.up")
