"""The source report's three rows and Phi-3-mini itself, to the last parameter.

Each figure is checked on the plan (config alone), on a model actually built by transformers from
what the plan says, and on the report.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config

import llmslim
from llmslim import Recipe
from llmslim.fitting.apply import rewrite
from llmslim.modeling.modeling_llmslim import become_slim, replace_sites
from llmslim.planning.planner import model_on_meta
from llmslim.planning.planner import plan as plan_on

PHI3_MINI: dict[str, Any] = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "tie_word_embeddings": False,
    "sliding_window": 2047,
}
ROWS = {
    "phi3-2layer": 226_507_776,
    "kphi3-2layer": 35_011_584,
    "kphi3-3layer": 52_515_840,
    "kphi3": 654_511_104,
}


def non_embedding(model: Any) -> int:
    total = sum(p.numel() for p in model.parameters())
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    return total - sum(module.weight.numel() for module in embeddings)


@pytest.mark.parametrize("name", ROWS)
def test_from_plan_and_report(name: str) -> None:
    plan = llmslim.plan(Phi3Config(**PHI3_MINI), name)
    totals = plan.report().totals
    assert totals.non_embedding_before == 3_624_078_336
    assert totals.non_embedding_after == ROWS[name]


@pytest.mark.parametrize("name", ROWS)
def test_from_a_model_built(name: str) -> None:
    recipe = Recipe.load(name)
    model = model_on_meta(Phi3Config(**PHI3_MINI))
    plan = plan_on(model, recipe)
    with torch.device("meta"):
        config = Phi3Config(**PHI3_MINI)
        for key, value in plan.text_config.items():
            object.__setattr__(config, key, value)
        built = AutoModelForCausalLM.from_config(config)
        sites = {site.new_name: site.spec for site in plan.sites}
        replace_sites(built, sites)
        if sites:
            become_slim(built, sites)
    assert non_embedding(built) == ROWS[name]


def test_smaller_model_rewritten_has_what_the_plan_says() -> None:
    sizes = {"hidden_size": 768, "intermediate_size": 1024, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    small = {**PHI3_MINI, **sizes, **heads, "vocab_size": 64, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(Phi3Config(**small))
    published = Recipe.load("kphi3-2layer").model_dump(exclude_unset=True)
    recipe = Recipe.of({**published, "width": {"intermediate_size": 1536}})
    plan = plan_on(model, recipe)
    report = rewrite(model, plan)
    # By hand: qkv 768->2304 G=3, o G=3, gate_up 768->3072 G=3, down 1536->768 G=6, two norms;
    # a final norm; 2 layers.
    layer = 2 * 768 * (2304 + 768 + 3072) // 3 + 2 * 1536 * 768 // 6 + 2 * 768
    assert report.totals.non_embedding_after == 2 * layer + 768 == non_embedding(model)
