"""Roles of projections: against what the model's own code computes, and against lists by hand."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import pytest
import torch
import transformers as tf
from every_architecture import (
    config_classes,
    default_config,
    logits,
    tiny_config,
    tiny_model,
)
from general_recipes import NOT_PLANNED, general_recipes
from torch import nn
from transformers import AutoModelForImageTextToText

from llmslim import SlimError, fitting, planning
from llmslim.anatomy.roles import find_roles
from llmslim.anatomy.sites import Conv1D
from llmslim.planning.planner import model_on_meta
from llmslim.recipe import ROLES, Recipe

pytestmark = pytest.mark.filterwarnings("ignore")  # what other people's models warn of
CLASSES = config_classes()
ATTENTION = {f"self_attn.{letter}_proj": f"attention.{letter}" for letter in "qkvo"}
GATED = {f"mlp.{part}_proj": f"mlp.{part}" for part in ("gate", "up", "down")}
EXPERTS = {f"mlp.experts.{part}_proj": f"experts.{part}" for part in ("gate_up", "down")}
BERT = {
    "attention.self.query": "attention.q",
    "attention.self.key": "attention.k",
    "attention.self.value": "attention.v",
    "attention.output.dense": "attention.o",
    "intermediate.dense": "mlp.up",
    "output.dense": "mlp.down",
}
LATENT = {
    "self_attn.q_a_proj": "attention.q",
    "self_attn.q_b_proj": "attention.q",
    "self_attn.kv_a_proj_with_mqa": "attention.kv",
    "self_attn.kv_b_proj": "attention.kv",
    "self_attn.o_proj": "attention.o",
}
SHARED = {f"mlp.shared_experts.{p}_proj": f"shared_experts.{p}" for p in ("gate", "up", "down")}
TRUTH: dict[str, tuple[str, dict[str, str]]] = {
    "llama": ("model.layers.0", ATTENTION | GATED),
    "phi3": (
        "model.layers.0",
        {
            "self_attn.qkv_proj": "attention.qkv",
            "self_attn.o_proj": "attention.o",
            "mlp.gate_up_proj": "mlp.gate_up",
            "mlp.down_proj": "mlp.down",
        },
    ),
    "gpt2": (
        "transformer.h.0",
        {
            "attn.c_attn": "attention.qkv",
            "attn.c_proj": "attention.o",
            "mlp.c_fc": "mlp.up",
            "mlp.c_proj": "mlp.down",
        },
    ),
    "mixtral": ("model.layers.0", ATTENTION | EXPERTS),
    "qwen3_moe": ("model.layers.0", ATTENTION | EXPERTS),
    "deepseek_v3": ("model.layers.1", LATENT | EXPERTS | SHARED),
    "mamba": ("backbone.layers.0", {"mixer.in_proj": "ssm.in"}),
    "bert": ("bert.encoder.layer.0", BERT),
    "xmod": (
        "roberta.encoder.layer.0",
        BERT | {f"output.adapter_modules.en_XX.dense{n}": "" for n in (1, 2)},
    ),
    "modernbert-decoder": (
        "model.layers.0",
        {f"attn.{letter}_proj": f"attention.{letter}" for letter in "qkv"}
        | {"attn.Wo": "attention.o", "mlp.Wi": "mlp.gate_up", "mlp.Wo": "mlp.down"},
    ),
    "rwkv": (
        "rwkv.blocks.0",
        {f"attention.{name}": "ssm.in" for name in ("key", "value", "receptance")}
        | {"feed_forward.key": "mlp.up", "feed_forward.receptance": "mlp"},
    ),
    "xlm": (
        "transformer",
        {f"attentions.0.{letter}_lin": f"attention.{letter}" for letter in "qkv"}
        | {
            "attentions.0.out_lin": "attention.o",
            "ffns.0.lin1": "mlp.up",
            "ffns.0.lin2": "mlp.down",
        },
    ),
    "jetmoe": (
        "model.layers.0",
        {
            "self_attention.kv_proj": "attention.kv",
            "self_attention.experts.input_linear.weight": "attention.q",
            "self_attention.experts.output_linear.weight": "attention.o",
            "mlp.input_linear.weight": "experts.gate_up",
            "mlp.output_linear.weight": "experts.down",
        },
    ),
    "recurrent_gemma": (
        "model.layers.0",
        {f"temporal_block.linear_{x}": "ssm.in" for x in "xy"}
        | {"temporal_block.linear_out": "ssm.out"}
        | {f"mlp_block.{part}_proj": f"mlp.{part}" for part in ("gate", "up", "down")},
    ),
    "gemma3n_text": (
        "model.layers.0",
        ATTENTION
        | GATED
        | dict.fromkeys(
            [
                *("laurel.linear_left", "laurel.linear_right", "altup.modality_router"),
                *("per_layer_input_gate", "per_layer_projection"),
            ],
            "",
        ),
    ),
    "gemma3": ("model.language_model.layers.0", ATTENTION | GATED),
}
"""A decoder layer of each, and the role of every dense map in it, as its code uses them."""


@pytest.mark.parametrize("name", TRUTH)
def test_roles_are_what_the_models_code_does(name: str) -> None:
    roles = find_roles(model_on_meta(tiny_config(CLASSES[name])))
    top, expected = TRUTH[name]
    if name == "xlm":
        found = {n: r for n, r in roles.items() if ".0." in n}
    else:
        found = {n: r for n, r in roles.items() if n.startswith(f"{top}.")}
    assert found == {f"{top}.{inner}": role for inner, role in expected.items()}


NOT_BUILT = {
    "gemma3n",  # needs timm
    *("gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody"),
}
"""What transformers builds no model of from its default config, nor from a tiny one."""
NOT_TINY = {*NOT_BUILT, "blt"}  # its cache asks for a field that its config does not have


def _sweep(*default: str, without: set[str] = NOT_TINY) -> Any:
    """Return every architecture for a parameter but some, all but a few of them slow."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[] if name in default else pytest.mark.slow)
            for name in sorted(CLASSES.keys() - without)
        ],
    )


@torch.no_grad()
def _input_of(model: nn.Module, name: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].clone())
    )
    try:
        logits(model)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def _negate(model: nn.Module, *names: str) -> None:
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            parameter.neg_()


def _one_of_each(model: Any, whole: str, parts: tuple[str, ...]) -> list[str]:
    """Return the names of a role's parts in the first module that has one of each."""
    modules = dict(model.named_modules())
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, role in find_roles(model).items():
        kind, _, part = role.partition(".")
        layer = re.match(r".*?\.\d+\.", name)
        if kind == whole and layer and isinstance(modules.get(name), nn.Linear | Conv1D):
            # A layer may have two attentions.
            inner = name[layer.end() :].partition(".")[0] if whole == "attention" else ""
            found[layer.group() + inner][part].append(name)
    for names in found.values():
        if [len(names[part]) for part in parts] == [1] * len(parts):
            return [names[part][0] for part in parts]
    # Reason to skip: the test compares separate projections, and this architecture fuses them all.
    pytest.skip(f"{type(model).__name__} has no module with one projection each for {parts}")


@_sweep("llama", "cpmant", "lfm2", "xlstm", "recurrent_gemma")
def test_the_neurons_are_odd_in_up_and_not_in_gate(name: str) -> None:
    model = tiny_model(CLASSES[name])
    gate, up, down = _one_of_each(model, "mlp", ("gate", "up", "down"))
    before = _input_of(model, down)
    _negate(model, up)
    torch.testing.assert_close(_input_of(model, down), -before)
    _negate(model, up, gate)
    assert not torch.allclose(_input_of(model, down), -before)


UNLIKE = re.compile("qwen(3_5|3_next|4)|doge")
"""Whose q is a gate of the output as well, or whose mask is made of v."""


@_sweep(
    *("llama", "bert", "gptj", "jamba", "recurrent_gemma", "xglm"),
    without={*NOT_TINY, *filter(UNLIKE.match, CLASSES)},
)
def test_attention_is_odd_in_v_and_even_in_q_with_k(name: str) -> None:
    model = tiny_model(CLASSES[name])
    q, k, v, o = _one_of_each(model, "attention", ("q", "k", "v", "o"))
    before = _input_of(model, o)
    _negate(model, q, k)
    torch.testing.assert_close(_input_of(model, o), before)
    _negate(model, v)
    torch.testing.assert_close(_input_of(model, o), -before)


@_sweep(
    *("bert", "blt", "dbrx", "jetmoe", "mamba", "modernbert-decoder", "moshi", "rwkv", "xlm"),
    without=NOT_BUILT,
)
def test_general_recipes_save_something_of_every_architecture(name: str) -> None:
    model = model_on_meta(default_config(name, CLASSES[name]))
    beginning, _ = NOT_PLANNED.get(name, ("none", ""))
    for recipe, share in general_recipes(model).items():
        assert (share == 1) == recipe.startswith(beginning), recipe


IMAGES = {
    "gemma3": tf.Gemma3Config,
    "git": tf.GitConfig,
    "idefics": tf.IdeficsConfig,  # its image encoder has as many layers as the decoder
    "llava": tf.LlavaConfig,
    "qwen2_vl": tf.Qwen2VLConfig,
    "smolvlm": tf.SmolVLMConfig,
}


@pytest.mark.parametrize("name", IMAGES)
def test_only_the_text_decoder_has_roles(name: str) -> None:
    config = IMAGES[name]()
    if name == "git":
        config.num_hidden_layers = config.vision_config.num_hidden_layers
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    roles = find_roles(model)
    having = [n for n, role in roles.items() if role]
    assert not [n for n in having if re.search("vis|image|connector|project(or|ion)\\.", n)]
    text = config.get_text_config()
    assert len({re.findall(r"\.(\d+)\.", n)[0] for n in having}) == text.num_hidden_layers
    downs = [n for n, role in roles.items() if role == "mlp.down"]
    sizes = {model.get_submodule(n).in_features for n in downs}
    assert sizes == {text.intermediate_size}


def test_names_that_say_nothing_leave_what_sizes_tell() -> None:
    model = model_on_meta(tf.GPT2Config(n_layer=2, n_embd=48, n_head=4))
    for block in model.transformer.h:
        mlp = block.mlp
        mlp.one, mlp.two = mlp.c_fc, mlp.c_proj
        del mlp.c_fc, mlp.c_proj
        block.whatever = mlp
        del block.mlp
    roles = find_roles(model)
    assert roles["transformer.h.1.whatever.one"] == "mlp.up"
    assert roles["transformer.h.1.whatever.two"] == "mlp.down"


@pytest.mark.parametrize("name", ["llama", "bert", "qwen3_moe"])
def test_a_slim_model_has_the_roles_of_what_is_left(name: str) -> None:
    model = tiny_model(CLASSES[name])
    before = find_roles(model)
    first = ["mlp.up", "experts.gate_up", "attention.q"]
    rule = {"role": first, "structure": "low_rank", "keep_ratio": 0.5}
    report = fitting.rewrite(model, planning.plan(model, Recipe.of({"replace": [rule]})))
    replaced = {row.name for row in report.rows if row.action == "replaced"}
    assert {before[n] for n in replaced} == set(first) & set(before.values())
    assert find_roles(model) == {n: role for n, role in before.items() if n not in replaced}


def test_experts_of_a_module_each_are_experts() -> None:
    model = model_on_meta(tiny_config(CLASSES["qwen3_moe"]))
    for layer in model.model.layers:
        with torch.device("meta"):
            layer.mlp.experts = nn.ModuleList(
                tf.models.llama.modeling_llama.LlamaMLP(
                    tf.LlamaConfig(hidden_size=64, intermediate_size=32)
                )
                for _ in range(4)
            )
    roles = find_roles(model)
    one = "model.layers.0.mlp.experts.3"
    assert [roles[f"{one}.{p}_proj"] for p in ("gate", "up", "down")] == [
        "experts.gate",
        "experts.up",
        "experts.down",
    ]


def test_every_role_found_is_one_that_recipes_know() -> None:
    for name in TRUTH:
        assert {*find_roles(model_on_meta(tiny_config(CLASSES[name]))).values()} <= {"", *ROLES}


def rows_of(rules: list[dict[str, Any]], name: str = "llama") -> dict[str, Any]:
    recipe = Recipe.of({"replace": rules})
    return {row.name: row for row in planning.plan(tiny_config(CLASSES[name]), recipe).rows}


def test_a_role_and_a_glob_must_both_hold() -> None:
    rules = [
        {"role": "mlp", "match": "*.layers.0.*", "keep": True},
        {"role": ["mlp", "attention.o"], "structure": "low_rank", "keep_ratio": 0.5},
    ]
    rows = rows_of(rules)
    actions = {name: row.action for name, row in rows.items() if row.role}
    assert actions["model.layers.0.mlp.up_proj"] == "kept"
    assert actions["model.layers.0.self_attn.o_proj"] == "replaced"
    assert actions["model.layers.1.mlp.up_proj"] == "replaced"
    assert actions["model.layers.1.self_attn.q_proj"] == "unmatched"
    assert rows["model.layers.1.mlp.up_proj"].role == "mlp.up"
    assert rows["lm_head"].role == rows["model.embed_tokens"].role == ""


@pytest.mark.parametrize("name", ["bitnet", "rwkv"])
def test_a_width_is_refused_where_the_neurons_are_not_the_mlps_own(name: str) -> None:
    problem = problem_of({"role": "mlp.up", "structure": "width", "keep_ratio": 0.5}, name)
    assert "this one (mlp.up) is not part of one whose neurons can be removed" in problem


def problem_of(rule: dict[str, Any], name: str) -> str:
    with pytest.raises(SlimError) as caught:
        rows_of([rule], name)
    (problem,) = caught.value.problems
    return problem


def test_a_role_that_a_model_lacks_is_reported_with_those_it_has() -> None:
    problem = problem_of({"role": ["mlp", "experts"], "keep": True}, "mamba")
    assert problem == (
        "recipe replace[0].role: mlp, experts matches no projection of MambaForCausalLM; it has "
        "ssm.in. Name one of those."
    )
    problem = problem_of({"role": "mlp.gate_up", "keep": True}, "llama")
    assert "it has mlp.gate, mlp.up, mlp.down, attention.q, attention.k," in problem


def test_a_glob_that_fits_nothing_of_a_role_is_reported_with_the_closest_of_it() -> None:
    problem = problem_of({"role": "mlp", "match": "*.q_proj", "keep": True}, "llama")
    assert (
        "replace[0].match: *.q_proj matches no projection of LlamaForCausalLM with role" in problem
    )
    assert "closest are model.layers.0.mlp." in problem
    assert "self_attn" not in problem
