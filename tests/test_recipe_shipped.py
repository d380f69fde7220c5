"""The shipped recipes: each reads well, says what it says, and fits the models it is for."""

from __future__ import annotations

import re
import typing
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmslim.anatomy.roles import find_roles
from llmslim.modeling.structured import structure_class
from llmslim.plugins import STRUCTURES, structure_options
from llmslim.recipe import Recipe, first_rule, rules_by_name, shipped_recipes

FOLDER = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.stem for path in FOLDER.rglob("*.yaml"))
ANY_MODEL = [
    *("grouped-half", "grouped-third", "mlp-light", "mlp-half", "mlp-third"),
    *("plain-light", "plain-half"),
]

# Phi-3-mini, from its published config: hidden size, layers.
HIDDEN, LAYERS = 3072, 32


def test_every_recipe_in_the_folder_is_shipped():
    assert list(shipped_recipes()) == NAMES
    assert set(NAMES) >= {"kphi3", "kphi3-2layer", "kphi3-3layer", "phi3-2layer", *ANY_MODEL}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_reads_and_opens_with_how_to_use_it(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description
    opening = (FOLDER / f"{name}.yaml").read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    assert re.search(rf"#   llmslim convert \S+ --recipe {name} --out \S+\n", opening)
    assert "Override:" in opening


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_names_a_structure_that_takes_its_options(name):
    for rule in Recipe.load(name).replace:
        if rule.structure == "auto":
            assert not rule.options()
            continue
        if rule.structure == "width":  # neurons of whole MLPs, no block
            assert rule.options().keys() == {"keep_ratio"}
            continue
        cls = structure_class(rule.structure)
        assert cls.resolve(3072, 9216, cls.read_options(rule.options()))


def non_embedding_params(recipe: Recipe) -> int:
    """Count what `recipe` makes of Phi-3-mini by hand: projections of each layer, and the norms."""
    layers = LAYERS if recipe.depth is None else recipe.depth.keep_layers
    mlp = 8192 if recipe.width is None else recipe.width.intermediate_size
    if recipe.budget is not None:  # neurons of every MLP, until it is measured which keeps how much
        mlp = int(mlp * Fraction(recipe.budget).limit_denominator(100))
    per_layer = 2 * HIDDEN  # its two norms
    for projection, role, inputs, outputs in (
        ("self_attn.qkv_proj", "attention.qkv", HIDDEN, 3 * HIDDEN),
        ("self_attn.o_proj", "attention.o", HIDDEN, HIDDEN),
        ("mlp.gate_up_proj", "mlp.gate_up", HIDDEN, 2 * mlp),
        ("mlp.down_proj", "mlp.down", mlp, HIDDEN),
    ):
        index = first_rule(recipe, f"model.layers.0.{projection}", role)
        weights = inputs * outputs
        if index is not None and recipe.replace[index].structure != "auto":
            rule = recipe.replace[index]
            cls = structure_class(rule.structure)
            groups = cls.resolve(inputs, outputs, cls.read_options(rule.options())).groups
            weights = 2 * inputs * outputs // groups
        per_layer += weights
    return layers * per_layer + HIDDEN  # and the last norm


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("phi3-2layer", 226_507_776),
        ("kphi3-2layer", 35_011_584),
        ("kphi3-3layer", 52_515_840),
        ("kphi3", 654_511_104),
    ],
)
def test_the_reports_rows_have_the_reports_parameters(name, published):
    recipe = Recipe.load(name)
    assert non_embedding_params(recipe) == published
    opening = (FOLDER / f"{name}.yaml").read_text().split("\n\n")[0]
    assert f"{published:,}" in opening


def test_phi3_mini_itself_is_counted_right():
    assert non_embedding_params(Recipe(name="dense")) == 3_624_078_336


@pytest.mark.parametrize("name", ["phi3-2layer", "kphi3-2layer", "kphi3-3layer", "kphi3"])
def test_the_reports_recipes_train_as_the_report_did(name):
    heal = Recipe.load(name).heal
    assert (heal.data, heal.train, heal.epochs) == ("lamini", "all", 3)
    assert (heal.context_length, heal.learning_rate, heal.seed) == (4096, 1e-4, 42)
    assert (heal.template, heal.loss_on, heal.objective) == ("report", "all", "cross_entropy")
    assert (heal.schedule, heal.warmup, heal.weight_decay, heal.patience) == (
        "constant",
        0,
        0,
        None,
    )
    assert (heal.batch_size, heal.tokens, heal.teacher) == (1, None, None)


@pytest.mark.parametrize("name", ["kphi3", "kphi3-2layer", "kphi3-3layer"])
def test_the_phi3_recipes_replace_all_projections_of_a_layer_and_nothing_else(name):
    replaced = matched(Recipe.load(name), "phi3")
    assert replaced == {
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.mlp.down_proj",
    }


GATED = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
# Model type to the MLP projections of its first decoder layer, as the model's own code names them.
MLPS = {
    "llama": ("model.layers.0", GATED),
    "mistral": ("model.layers.0", GATED),
    "qwen2": ("model.layers.0", GATED),
    "qwen3": ("model.layers.0", GATED),
    "gemma": ("model.layers.0", GATED),
    "gemma2": ("model.layers.0", GATED),
    "gemma3_text": ("model.layers.0", GATED),
    "olmo2": ("model.layers.0", GATED),
    "smollm3": ("model.layers.0", GATED),
    "phi3": ("model.layers.0", {"mlp.gate_up_proj", "mlp.down_proj"}),
    "glm": ("model.layers.0", {"mlp.gate_up_proj", "mlp.down_proj"}),
    "phi": ("model.layers.0", {"mlp.fc1", "mlp.fc2"}),
    "opt": ("model.decoder.layers.0", {"fc1", "fc2"}),
    "gpt2": ("transformer.h.0", {"mlp.c_fc", "mlp.c_proj"}),
    "gpt_neo": ("transformer.h.0", {"mlp.c_fc", "mlp.c_proj"}),
    "gpt_neox": ("gpt_neox.layers.0", {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}),
    "gptj": ("transformer.h.0", {"mlp.fc_in", "mlp.fc_out"}),
    "bloom": ("transformer.h.0", {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}),
    "falcon": ("transformer.h.0", {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}),
    "mpt": ("transformer.blocks.0", {"ffn.up_proj", "ffn.down_proj"}),
    "starcoder2": ("model.layers.0", {"mlp.c_fc", "mlp.c_proj"}),
}


def matched(recipe: Recipe, model_type: str) -> set[str]:
    """Return the dense maps of the first layer that the recipe matches, in a model of one layer."""
    config = CONFIG_MAPPING[model_type]()
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if key in config.to_dict() or key in type(config).attribute_map:
            setattr(config, key, 1)
    config.attention_layers = ["global"]  # GPT-Neo's own list; the others have no such field
    config.layer_types = None if model_type == "gpt_neo" else ["full_attention"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return set(rules_by_name(recipe, find_roles(model)))


@pytest.mark.parametrize("model_type", MLPS)
def test_the_any_model_recipes_match_the_mlp_and_nothing_else(model_type):
    prefix, names = MLPS[model_type]
    expected = {f"{prefix}.{name}" for name in names}
    for recipe in ANY_MODEL:
        assert matched(Recipe.load(recipe), model_type) == expected, recipe


@pytest.mark.parametrize("name", NAMES)
def test_the_readmes_parameter_counts_are_what_a_plan_gives(name):
    from transformers import Phi3Config

    from llmslim.planning.planner import plan

    totals = plan(Phi3Config(), Recipe.load(name)).report().totals
    readme = (FOLDER.parent / "README.md").read_text()
    assert f"{totals.non_embedding_before:,}" in readme
    (row,) = re.findall(rf"^\| `{name}` \|.*$", readme, re.MULTILINE)
    assert row.endswith(f"| {totals.non_embedding_after:,} | {100 * totals.kept_ratio:.2f} % |")


def _in_words(kind: object) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    if each := [part for part in typing.get_args(kind) if part is not type(None)]:
        return " or ".join(map(_in_words, each))
    return {int: "whole number", float: "number or fraction", str: "name"}[kind]


def test_the_tables_of_options_are_the_structures_own(update_golden: bool) -> None:
    page = Path("docs/recipes.md")
    text = page.read_text(encoding="utf-8")
    for name in STRUCTURES.names():
        rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
        for option in structure_options(name):
            default = "" if option.default is None else f"`{option.default}`"
            rows.append(
                f"| `{option.name}` | {_in_words(option.kind)} | {default} | {option.help} |"
            )
        marks = f"<!-- options of {name} -->\n", "<!-- end -->\n"
        before, _, rest = text.partition(marks[0])
        written, _, after = rest.partition(marks[1])
        table = "\n".join(rows) + "\n"
        if update_golden:
            page.write_text(text := f"{before}{marks[0]}{table}{marks[1]}{after}", encoding="utf-8")
        else:
            assert written == table, name
