"""What a user reads when a recipe does not fit the model: each message, with its values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model

import llmslim
from llmslim import RecipeError, SizeError, SlimError, TargetError
from llmslim.modeling.structured import structure_class
from llmslim.plugins import STRUCTURES, describe, structure_options

GROUPED = {"structure": "grouped_pointwise"}


def problems(recipe: dict[str, Any], architecture: str = "llama", **kwargs: Any) -> tuple[str, ...]:
    with pytest.raises(SlimError) as caught:
        llmslim.plan(tiny_config(architecture), recipe, **kwargs)
    return caught.value.problems


def test_rule_that_matches_nothing_names_the_closest() -> None:
    recipe = {"replace": [{"match": "*.mlp.up_prj", "keep": True}]}
    (sentence,) = problems(recipe)
    assert "replace[0].match: *.mlp.up_prj matches no projection of LlamaForCausalLM" in sentence
    assert "closest are model.layers.0.mlp.up_proj" in sentence
    with pytest.raises(TargetError):
        llmslim.plan(tiny_config("llama"), recipe)


def test_one_matching_glob_of_several_is_enough() -> None:
    rule = {"match": ["*.mlp.*", "*.nothing"], **GROUPED, "groups": 4}
    assert llmslim.plan(tiny_config("llama"), {"replace": [rule]}).sites


def test_groups_that_do_not_divide_are_reported_once_per_size() -> None:
    recipe = {"replace": [{"match": "*.mlp.*", **GROUPED, "groups": 7}]}
    reported = problems(recipe)
    assert reported[0] == (
        "recipe replace[0].groups: model.layers.0.mlp.gate_proj and 7 more: groups 7 does not "
        "divide in_features 48 and out_features 96; allowed 1, 2, 3, 4, 6, 8, 12, 16, 24, 48."
    )
    assert len(reported) == 2
    with pytest.raises(SizeError):
        llmslim.plan(tiny_config("llama"), recipe)


def test_rank_out_of_range() -> None:
    (sentence,) = problems(
        {"replace": [{"match": "*.o_proj", "structure": "low_rank", "rank": 49}]}
    )
    assert "replace[0].rank: model.layers.0.self_attn.o_proj and 3 more: rank 49; allowed 1 to 48" in sentence  # fmt: skip  # noqa: E501


def test_option_of_another_structure() -> None:
    (sentence,) = problems({"replace": [{"match": "*.mlp.*", **GROUPED, "groups": 4, "rank": 2}]})
    assert sentence == (
        "recipe replace[0].rank: unknown key; allowed match, role, keep, structure, neurons, init, "
        "groups, min_channels_per_group, keep_ratio, variant, activation, channel_order."
    )


def test_unknown_init_names_those_there_are() -> None:
    rule = {"match": "*.mlp.*", "structure": "low_rank", "rank": 1}
    known = "allowed least_squares, project, random, random_published."
    assert problems({"replace": [rule], "init": "svd"}) == (f"recipe init: 'svd'; {known}",)
    assert problems({"replace": [rule]}, init="x") == (f"--init: 'x'; {known}",)


def test_internal_structures_are_not_for_recipes() -> None:
    (sentence,) = problems({"replace": [{"match": "*.mlp.*", "structure": "linear"}]})
    assert sentence.startswith("recipe replace[0].structure: 'linear'; allowed auto, block_shuffle")


@pytest.mark.parametrize("name", STRUCTURES.names())
def test_options_are_the_same_read_from_the_text_and_from_the_class(name: str) -> None:
    assert structure_options(name) == describe(structure_class(name).Options)


def test_an_activation_cannot_be_projected() -> None:
    rule = {"match": "*.mlp.*", **GROUPED, "groups": 4, "variant": "residual", "activation": "silu"}
    assert "init project needs a linear block" in problems({"replace": [rule]})[0]
    assert llmslim.plan(tiny_config("llama"), {"replace": [rule], "init": "random"}).sites


def test_everything_at_once_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "depth:\n  keep_layers: 9\nreplace:\n  - match: '*.mlpp.*'\n    keep: true\n"
        "  - match: '*.mlp.*'\n    structure: grouped_pointwise\n    groups: 5\n",
        encoding="utf-8",
    )
    with pytest.raises(RecipeError) as caught:
        llmslim.plan(tiny_config("llama"), path)
    reported = caught.value.problems
    assert [sentence.partition(": ")[0].removeprefix(f"{path}:") for sentence in reported] == [
        "2 depth.keep_layers",
        "4 replace[0].match",
        "8 replace[1].groups",
        "8 replace[1].groups",
    ]


def test_nothing_is_touched_when_a_plan_fails() -> None:
    model = tiny_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SlimError):
        llmslim.slim(model, {"replace": [{"match": "*.mlp.*", **GROUPED, "groups": 7}]})
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_rows_say_why() -> None:
    recipe = {
        "depth": {"keep_layers": [0, 1, 3]},
        "replace": [
            {"match": "*.0.*", "keep": True},
            {"match": "*.down_proj", **GROUPED, "min_channels_per_group": 96},
            {"match": "*.up_proj", "structure": "low_rank", "rank": 3},
        ],
    }
    model = tiny_model("llama", tie_word_embeddings=True)
    rows = {row.name: row for row in llmslim.plan(model, recipe).rows}

    def outcome(name: str) -> tuple[str, str]:
        return rows[name].action, rows[name].reason

    assert outcome("model.layers.2.mlp.up_proj") == ("dropped", "decoder layer 2 is dropped")
    assert outcome("model.layers.0.mlp.up_proj") == ("kept", "replace[0] keeps it")
    action, reason = outcome("model.layers.1.mlp.down_proj")
    assert action == "kept"
    assert "no common divisor of 96 and 48 from 2 to 1" in reason
    assert outcome("model.layers.1.mlp.gate_proj") == ("unmatched", "no rule matches")
    assert outcome("model.norm") == ("kept", "a norm")
    assert outcome("lm_head") == ("tied", "shares its parameters with model.embed_tokens")
    assert rows["lm_head"].params_before == 0
    assert rows["lm_head"].flops_per_token_after == 2 * 96 * 48
    assert rows["model.layers.1.mlp.up_proj"].options == {"rank": 3}
    assert sum(row.params_before for row in rows.values()) == sum(p.numel() for p in model.parameters())  # fmt: skip  # noqa: E501


def test_a_rule_behind_another_is_noted() -> None:
    recipe = {
        "replace": [
            {"match": "*.mlp.*", "structure": "low_rank", "rank": 3},
            {"match": "*.up_proj", "keep": True},
        ]
    }
    (note,) = llmslim.plan(tiny_config("llama"), recipe).report().problems
    assert (
        note == "recipe replace[1]: all 4 projections it matches are taken by replace[0] above it."
    )


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        (
            {"replace": [{"match": "lm_head", "structure": "low_rank", "rank": 4}]},
            {"tie_word_embeddings": True},
            "replaces nothing; lm_head: shares its parameters with model.embed_tokens.",
        ),
        (
            {
                "depth": {"keep_layers": [0, 2]},
                "replace": [{"match": "*.1.mlp.*", "structure": "low_rank", "rank": 4}],
            },
            {},
            "replaces nothing; model.layers.1.mlp.gate_proj and 2 more: decoder layer 1 is dropped",
        ),
        (
            {"replace": [{"match": "*.mlp.*", "structure": "width", "keep_ratio": 1}]},
            {},
            "replaces nothing; model.layers.0.mlp.gate_proj and 11 more: stays as it is.",
        ),
    ],
)
def test_a_rule_without_effect_is_noted(
    recipe: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    config = tiny_config("llama")
    for key, value in changes.items():
        setattr(config, key, value)
    made = llmslim.plan(config, recipe)
    assert any(f"recipe replace[0]: {said}" in note for note in made.notes), made.notes
    effective = {"match": "*.2.mlp.*", "structure": "low_rank", "rank": 4}
    both = {**recipe, "replace": [{**effective, "match": "*.2.self_attn.*"}]}
    assert not llmslim.plan(config, both).notes
