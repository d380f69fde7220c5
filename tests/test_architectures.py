"""Every architecture on the list: plan, slim, save, load, same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import ARCHITECTURES, few, logits, tiny_config, tiny_model, tokens
from transformers import AutoModelForCausalLM

import llmslim
from llmslim import Recipe

MLP = ["*.mlp.*", "*.fc1", "*.fc2"]
HALF = Recipe.of({"replace": [{"match": MLP, "structure": "grouped_pointwise", "keep_ratio": 0.5}]})
ATTENTION = [
    "*attn.*_proj", "*attn.c_*", "*.query_key_value", "*attention.dense", "*attn.out_proj",
    "*.qkv_proj",
]  # fmt: skip
ALL_SECTIONS = Recipe.of(
    {
        "depth": {"keep_layers": [0, 2, 3]},
        "width": {"intermediate_size": 144},
        "replace": [
            {"match": MLP, "structure": "grouped_pointwise", "groups": 4},
            {"match": ATTENTION, "structure": "low_rank", "keep_ratio": "1/3"},
        ],
    }
)


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("recipe", "architecture"),
    [
        *(pytest.param(ALL_SECTIONS, name, id=f"all_sections-{name}") for name in ARCHITECTURES),
        *(pytest.param(HALF, name, id=f"half-{name}") for name in ("llama", "phi3", "gpt2")),
    ],
)
def test_plan_slim_save_load(architecture: str, recipe: Recipe, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    before = count(model)
    planned = llmslim.plan(tiny_config(architecture), recipe).report()
    report = llmslim.slim(model, recipe)

    assert planned.totals == report.totals
    assert report.totals.params_before == before
    assert report.totals.params_after == count(model) < before
    assert len({row.name for row in report.rows}) == len(report.rows)
    replaced = [row for row in report.rows if row.action == "replaced"]
    assert replaced
    assert all(row.init_error is not None for row in replaced)

    ids = tokens()
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, ids), expected)

    loaded.save_pretrained(tmp_path / "second")
    files = sorted(p.name for p in (tmp_path / "first").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "second").iterdir())
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize("architecture", few(ARCHITECTURES))
def test_what_no_rule_names_stays_bitwise(architecture: str) -> None:
    model, dense = tiny_model(architecture), tiny_model(architecture)
    report = llmslim.slim(model, HALF)
    replaced = {row.name for row in report.rows if row.action == "replaced"}
    before, after = dense.state_dict(), model.state_dict()
    untouched = [key for key in before if key.rpartition(".")[0] not in replaced]
    assert len(replaced) == 4 * (3 if f"{architecture}" in GATED else 2)
    for key in untouched:
        assert torch.equal(before[key], after[key]), key


GATED = {"llama", "qwen2", "qwen3", "gemma", "mistral"}


@pytest.mark.parametrize("architecture", few(ARCHITECTURES, ("llama", "phi3", "gpt2", "mistral")))
def test_generation_with_cache_equals_without(architecture: str) -> None:
    model = tiny_model(architecture)
    llmslim.slim(model, ALL_SECTIONS)
    ids = tokens(rows=1)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached = model.generate(ids, use_cache=True, **kwargs)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **kwargs))
    assert cached.shape[1] > ids.shape[1]


@pytest.mark.parametrize("architecture", few(ARCHITECTURES))
def test_ledger_has_every_parameter_of_every_architecture(architecture: str) -> None:
    model = tiny_model(architecture)
    rows = llmslim.plan(model, HALF).rows
    owners = {name for name, module in model.named_modules() if module._parameters}
    assert {row.name for row in rows} == {
        name
        for name in owners
        if any(p is not None for p in model.get_submodule(name)._parameters.values())
    }
    embeddings = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) or module is model.get_output_embeddings()
    }
    assert {row.name for row in rows if row.counts_as_embedding} == embeddings
    assert sum(row.params_before for row in rows) == sum(p.numel() for p in model.parameters())
