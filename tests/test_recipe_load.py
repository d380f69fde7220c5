"""Reading recipes: what is accepted, and that a refusal names its file, line, key and value."""

from __future__ import annotations

import json
from pathlib import Path

import pydantic
import pytest

from llmslim.errors import RecipeError
from llmslim.plugins import STRUCTURES, structure_options
from llmslim.recipe import ROLES, Recipe, json_schema, shipped_recipes
from llmslim.recipe.load import recipe_yaml

GOOD = """\
# a comment
name: mine
description: all keys
source: nowhere
depth:
  keep_layers: [0, 2]
width:
  intermediate_size: 64
replace:
  - match: "*.down_proj"
    keep: true
  - match: ["*.up_proj", "*.gate_proj"]
    structure: grouped_pointwise
    variant: residual
    activation: silu
    groups: 4
    init: random
  - match: "*.o_proj"
    structure: low_rank
    keep_ratio: 1/3
init: random
calibration:
  data: text.jsonl
  tokens: 1000
  sequence_length: 128
  seed: 3
heal:
  data: self
  train: lora
  tokens: 5000
  context_length: 256
  learning_rate: 2.0e-4
"""


@pytest.fixture
def write(tmp_path: Path):
    """Return a function that writes a recipe file and returns its path."""

    def write_recipe(text: str | bytes, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write_recipe


def problems_of(path: Path | str) -> list[str]:
    """Load what must be refused; return its sentences, without the folder."""
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    folder = f"{Path(path).parent}/"
    return [sentence.removeprefix(folder) for sentence in caught.value.problems]


def test_every_key_arrives(write):
    recipe = Recipe.load(write(GOOD))
    assert (recipe.name, recipe.description, recipe.source) == ("mine", "all keys", "nowhere")
    assert recipe.depth.keep_layers == [0, 2]
    assert recipe.width.intermediate_size == 64
    keep, grouped, low_rank = recipe.replace
    assert keep.globs == ("*.down_proj",)
    assert keep.keep is True
    assert grouped.globs == ("*.up_proj", "*.gate_proj")
    assert grouped.options() == {"variant": "residual", "activation": "silu", "groups": 4}
    assert (grouped.init, low_rank.init, recipe.init) == ("random", None, "random")
    assert low_rank.options() == {"keep_ratio": pytest.approx(1 / 3)}
    assert (recipe.calibration.data, recipe.calibration.tokens) == ("text.jsonl", 1000)
    assert (recipe.calibration.sequence_length, recipe.calibration.seed) == (128, 3)
    assert (recipe.heal.train, recipe.heal.tokens, recipe.heal.learning_rate) == (
        "lora",
        5000,
        2e-4,
    )


def test_the_name_is_the_files_own_where_none_is_given(write):
    assert Recipe.load(write("init: random\n", "half-size.yaml")).name == "half-size"


def test_a_recipe_is_frozen(write):
    recipe = Recipe.load(write(GOOD))
    with pytest.raises(pydantic.ValidationError) as caught:
        recipe.init = "project"
    assert [error["type"] for error in caught.value.errors()] == ["frozen_instance"]


def test_a_recipe_comes_from_a_dictionary_a_path_a_name_or_itself(write):
    from_file = Recipe.of(write(GOOD))
    assert Recipe.of(from_file) is from_file
    from_dict = Recipe.of(json.loads(from_file.model_dump_json(exclude_none=True)))
    assert from_dict.model_dump() == from_file.model_dump()
    assert Recipe.of("kphi3").model_dump() == Recipe.load("recipes/kphi3.yaml").model_dump()
    with pytest.raises(RecipeError, match=r"^recipe replace\[0\]\.structur: .* structure\?$"):
        Recipe.of({"replace": [{"match": "*", "structur": "low_rank"}]})


def test_a_shipped_recipe_is_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Recipe.load("kphi3") == Recipe.load("recipes/kphi3.yaml")


def test_an_unknown_name_lists_the_shipped_recipes_and_the_nearest():
    (sentence,) = problems_of("kphi4")
    assert sentence.startswith("kphi4: no such recipe file")
    assert sentence.endswith("Did you mean kphi3?")
    for name in shipped_recipes():
        assert name in sentence


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "init: project\ndept:\n  keep_layers: 2\n",
            "mine.yaml:2 dept: unknown key; allowed name, description, source, depth, width, "
            "replace, budget, init, calibration, refine, heal. Did you mean depth?",
        ),
        (
            "replace:\n  - match: '*'\n    structure: low_rank\n    ranks: 4\n",
            "mine.yaml:4 replace[0].ranks: unknown key; allowed match, role, keep, structure, "
            "neurons, init, rank, keep_ratio. Did you mean rank?",
        ),
        (
            "replace:\n  - match: '*'\n    structure: lowrank\n    rank: 4\n",
            "mine.yaml:3 replace[0].structure: 'lowrank'; allowed auto, block_shuffle, "
            "grouped_low_rank, grouped_pointwise, low_rank, pivoted_low_rank, width. "
            "Did you mean low_rank?",
        ),
        (
            "replace:\n  - match: '*'\n    structure: low_rank\n    rank: 4.5\n",
            "mine.yaml:4 replace[0].rank: 4.5; input should be a valid integer.",
        ),
        (
            "replace:\n  - match: '*'\n    structure: width\n",
            "mine.yaml:2 replace[0].keep_ratio: field required.",
        ),
        (
            "depth:\n  keep_layers: 0\n",
            "mine.yaml:2 depth.keep_layers: 0; input should be greater than or equal to 1.",
        ),
        (
            "depth:\n  keep_layers: true\n",
            "mine.yaml:2 depth.keep_layers: True; input should be a valid integer.",
        ),
        (
            "replace:\n  - match: '*'\n    structure: low_rank\n    keep_ratio: 3/2\n",
            "mine.yaml:4 replace[0].keep_ratio: '3/2'; input should be less than or equal to 1.",
        ),
        (
            "replace:\n  - match: '*'\n    structure: low_rank\n    keep_ratio: 1/0\n",
            "mine.yaml:4 replace[0].keep_ratio: '1/0'; input should be a valid number, "
            "unable to parse string as a number.",
        ),
        (
            "replace:\n  - match: '*'\n    structure: grouped_pointwise\n    variant: io2\n",
            "mine.yaml:4 replace[0].variant: 'io2'; input should be 'io' or 'residual'.",
        ),
        (
            "replace:\n  - match: '*'\n",
            "mine.yaml:2 replace[0]: a rule says either `keep: true` or a `structure`.",
        ),
        (
            "replace:\n  - role: mlp.dwn\n    keep: true\n",
            f"mine.yaml:2 replace[0].role: 'mlp.dwn'; allowed {', '.join(ROLES)}. "
            "Did you mean mlp.down?",
        ),
        (
            "replace:\n  - keep: true\n    role:\n      - mlp\n      - head_of_state\n",
            f"mine.yaml:5 replace[0].role[1]: 'head_of_state'; allowed {', '.join(ROLES)}.",
        ),
        (
            "replace:\n  - role: 3\n    keep: true\n",
            "mine.yaml:2 replace[0].role: 3; a role, or a list of roles.",
        ),
        (
            "replace:\n  - keep: true\n",
            "mine.yaml:2 replace[0]: a rule says which projections by `match`, by `role` or by "
            "both.",
        ),
        (
            "replace:\n  - match: '*'\n    keep: true\n    groups: 2\n",
            "mine.yaml:4 replace[0].groups: unknown key; allowed match, role, keep, structure, "
            "neurons, init.",
        ),
        (
            "heal:\n  train: everything\n",
            "mine.yaml:2 heal.train: 'everything'; input should be 'blocks', 'all' or 'lora'.",
        ),
        (
            "init: ../../evil\n",
            "mine.yaml:1 init: '../../evil'; string should match pattern '^[a-z][a-z0-9_]*$'.",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_file_line_key_and_value(write, text, expected):
    assert problems_of(write(text)) == [expected]


def test_all_problems_come_together(write):
    text = "inti: random\nwidth:\n  intermediate_size: -3\nreplace:\n  - match: '*'\n    rank: 2\n"
    where = [sentence.split(": ")[0] for sentence in problems_of(write(text))]
    assert sorted(where) == [
        "mine.yaml:1 inti",
        "mine.yaml:3 width.intermediate_size",
        "mine.yaml:6 replace[0].rank",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("init: project\ninit: random\n", "mine.yaml:2 init: given twice. Keep one."),
        (
            "heal:\n  data: self\n  data: lamini\n",
            "mine.yaml:3 heal.data: given twice. Keep one.",
        ),
        ("a: &x 1\nb: *x\n", "mine.yaml: a YAML alias"),
        ("- a\n- b\n", "mine.yaml: holds no keys"),
        ("", "mine.yaml: holds no keys"),
        ("replace: [\n", "mine.yaml:2: not valid YAML"),
        ("name: !!python/object/apply:os.getcwd []\n", "mine.yaml:1: not valid YAML"),
        (b"name: \xff\n", "mine.yaml: cannot be read as UTF-8 text"),
        (b"#" * ((1 << 20) + 1), "mine.yaml: 1,048,577 bytes; a recipe has at most 1,048,576."),
        ("[" * 800 + "]" * 800, "mine.yaml: nested too deeply"),
        ("a: 0001-99-99\n", "mine.yaml: not valid YAML"),
    ],
)
def test_what_is_not_a_recipe_is_refused_in_one_sentence(write, text, expected):
    (sentence,) = problems_of(write(text))
    assert sentence.startswith(expected)


def test_an_object_tag_is_never_carried_out(write, tmp_path):
    target = tmp_path / "made-by-yaml"
    problems_of(write(f"name: !!python/object/apply:pathlib.Path.touch [{target}]\n"))
    assert not target.exists()


def test_where_names_the_nearest_line_that_is_known(write):
    recipe = Recipe.load(write(GOOD))
    assert recipe.where("replace", 1, "groups").endswith("mine.yaml:16 replace[1].groups")
    assert recipe.where("replace", 1, "rank").endswith("mine.yaml:12 replace[1].rank")
    assert recipe.problem(("init",), "no.").problems[0].endswith("mine.yaml:21 init: no.")


def test_the_json_schema_describes_every_key_and_is_closed():
    schema = json.loads(json_schema())
    rules = schema["$defs"].pop("Rule")["anyOf"]
    sections = [schema, *schema["$defs"].values(), *rules]
    assert len(sections) >= 6
    for section in sections:
        assert section["additionalProperties"] is False
    by_name = {
        rule["properties"]["structure"].get("const", "keep"): rule["properties"] for rule in rules
    }
    common = {"match", "role", "keep", "structure", "neurons", "init"}
    for name, rule in by_name.items():
        options = {option.name for option in structure_options(name) or ()}
        options |= {"keep_ratio"} if name == "width" else set()
        assert set(rule) == common | options, name
        for key, value in rule.items():
            assert value.get("description"), key
    assert {"keep", "auto", "width", *STRUCTURES.names()} == set(by_name)


def test_a_recipe_reads_back_under_its_own_name_with_all_that_was_set(tmp_path):
    """Of `init`, whether it was set counts: what is chosen by measurement has another default."""
    path = tmp_path / "other.yaml"
    recipe = Recipe.of({"name": "mine", "init": "project"})
    path.write_text(recipe_yaml(recipe))
    again = Recipe.load(path)
    assert again.model_dump() == recipe.model_dump()
    assert again.model_fields_set == recipe.model_fields_set == {"name", "init"}
    path.write_text("init: project\n")
    assert Recipe.load(path).name == "other"


def test_a_rule_keeps_or_replaces():
    for outcome in ({}, {"keep": True, "structure": "low_rank"}):
        with pytest.raises(RecipeError):
            Recipe.of({"replace": [{"match": "*", **outcome}]})
