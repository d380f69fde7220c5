"""A model drawn from a config alone, against transformers' own initialisation."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cli import _restore_logging as _restore_logging
from helpers_cli import ok, run, write_tokenizer
from tiny import tiny_config
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from llmslim import api
from llmslim.errors import CheckpointError, RecipeError
from llmslim.report.read import read_report

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "pad_token_id": 0,
    "initializer_range": 0.05,
}
DEPTH = {"keep_layers": 2}
WIDTH = {"intermediate_size": 288}
GROUPED = {"role": ["attention", "mlp"], "structure": "grouped_pointwise"}
KPHI3 = {
    "name": "small",
    "depth": DEPTH,
    "width": WIDTH,
    "replace": [{**GROUPED, "min_channels_per_group": 24}],
    "init": "random",
}
DENSE = {"name": "dense", "depth": DEPTH}


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Return a folder with a config and a tokenizer, and no weights."""
    folder = tmp_path / "bare"
    Phi3Config(**SIZES).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def drawn(folder: Path, out: Path, recipe: Any, **options: Any) -> dict[str, torch.Tensor]:
    path = api.convert(folder, recipe, out, **{"init": "random", **options}).path
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def by_transformers(seed: int, **changes: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    config = Phi3Config(**{**SIZES, "num_hidden_layers": 2, **changes})
    return AutoModelForCausalLM.from_config(config).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_dense_model_is_what_transformers_draws(bare: Path, tmp_path: Path) -> None:
    made = drawn(bare, tmp_path / "out", DENSE, seed=5)
    assert same(made, by_transformers(5))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "phi3"


def test_what_stays_dense_beside_blocks_is_what_transformers_draws(
    bare: Path, tmp_path: Path
) -> None:
    made = drawn(bare, tmp_path / "out", KPHI3, seed=5)
    dense = by_transformers(5)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(made[name], dense[name])
        std = SIZES["initializer_range"]
        error = std / math.sqrt(2 * made[name].numel())  # of the estimate of a normal's
        assert abs(float(made[name].std()) - std) < 6 * error
    norms = [tensor for name, tensor in made.items() if "norm" in name]
    assert len(norms) == 2 * 2 + 1
    assert all(bool((norm == 1).all()) for norm in norms)


def test_blocks_have_the_sizes_and_the_spread_of_fresh_linears(bare: Path, tmp_path: Path) -> None:
    made = drawn(bare, tmp_path / "out", KPHI3)
    for layer in (0, 1):
        for name, inputs, outputs, groups in (
            ("self_attn.qkv_proj", 96, 288, 4),
            ("self_attn.o_proj", 96, 96, 4),
            ("mlp.gate_up_proj", 96, 576, 4),
            ("mlp.down_proj", 288, 96, 12),
        ):
            weight = made[f"model.layers.{layer}.{name}.weight"]
            reads = 2 * inputs // groups  # both parts of the block
            assert weight.shape == (groups, reads, outputs // groups)
            # nn.Linear draws uniformly up to 1/sqrt(inputs), which has a third of its square as
            # variance.
            assert float(weight.std()) == pytest.approx(1 / math.sqrt(3 * reads), rel=0.1)


@pytest.mark.parametrize("init", ["random", "random_published"])
def test_blocks_are_those_that_would_replace_trained_maps(
    bare: Path, tmp_path: Path, init: str
) -> None:
    full = tmp_path / "full"
    shutil.copytree(bare, full)
    Phi3ForCausalLM(Phi3Config(**SIZES)).save_pretrained(full)
    made = drawn(bare, tmp_path / "a", KPHI3, init=init, seed=9)
    usual = drawn(full, tmp_path / "b", KPHI3, init=init, seed=9)
    blocks = [name for name in made if name.endswith("proj.weight")]
    assert len(blocks) == 2 * 4
    assert all(torch.equal(made[name], usual[name]) for name in blocks)
    # There the dense rest is the model's own.
    own = AutoModelForCausalLM.from_pretrained(full).state_dict()
    assert torch.equal(usual["lm_head.weight"], own["lm_head.weight"])
    assert not torch.equal(made["lm_head.weight"], own["lm_head.weight"])


def test_experts_are_drawn_as_those_that_replace_trained_ones(tmp_path: Path) -> None:
    config = MixtralConfig(
        **{key: SIZES[key] for key in ("hidden_size", "num_attention_heads", "vocab_size")},
        intermediate_size=64,
        num_hidden_layers=1,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    bare, full = tmp_path / "bare", tmp_path / "full"
    config.save_pretrained(bare)
    MixtralForCausalLM(config).save_pretrained(full)
    rule = {"role": "experts", "structure": "low_rank", "rank": 4}
    made, usual = (drawn(f, tmp_path / f"{f.name}-out", {"replace": [rule]}) for f in (bare, full))
    blocks = [name for name in made if ".experts." in name]
    assert blocks
    assert all(torch.equal(made[name], usual[name]) for name in blocks)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    bare: Path, tmp_path: Path
) -> None:
    before = torch.random.get_rng_state()
    one, again, other = (
        api.convert(bare, KPHI3, tmp_path / name, init="random", seed=seed).path
        for name, seed in (("one", 1), ("again", 1), ("other", 2))
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [path / "model.safetensors" for path in (one, again, other)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    first, third = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (one, other)
    )
    different = {name for name in first if not torch.equal(first[name], third[name])}
    assert different == {name for name in first if "norm" not in name}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_type_is_the_callers_or_the_configs(
    bare: Path, tmp_path: Path, dtype: str | None
) -> None:
    Phi3Config(**SIZES, dtype="float16").save_pretrained(bare)
    result = api.convert(bare, KPHI3, tmp_path / "out", init="random", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(result.path)
    assert result.report.totals.bytes_after == sum(p.nbytes for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype or "float16")}
    with pytest.raises(CheckpointError, match=r"int8.*allowed"):
        api.convert(bare, KPHI3, tmp_path / "no", init="random", dtype="int8")


def test_what_lies_beside_the_weights_comes_along(bare: Path, tmp_path: Path) -> None:
    settings = {"eos_token_id": [1, 7], "max_length": 33}
    (bare / "generation_config.json").write_text(json.dumps(settings))
    result = api.convert(bare, KPHI3, tmp_path / "out", init="random", seed=3)
    (note,) = [n for n in result.report.problems if "random" in n]
    assert "seed 3" in note
    assert note in read_report(result.path).report.problems
    assert api.verify(result.path).ok
    model = AutoModelForCausalLM.from_pretrained(result.path)
    assert model.generation_config.eos_token_id == [1, 7]
    vocabulary = AutoTokenizer.from_pretrained(result.path).get_vocab()
    assert vocabulary == AutoTokenizer.from_pretrained(bare).get_vocab()
    manifest = json.loads((result.path / "llmslim_manifest.json").read_text())
    assert "config.json" in manifest["source"]["files"]


def test_the_command_line_makes_one_and_heals_it_without_a_teacher(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: dict[str, Any] = {}
    monkeypatch.setattr(
        "llmslim.cli.commands.convert.heal_and_show",
        lambda path, _json, **options: called.update(options, path=path),
    )
    recipe = tmp_path / "small.yaml"
    recipe.write_text(json.dumps(KPHI3))
    out = tmp_path / "out"
    ok("convert", bare, "--recipe", recipe, "--init", "random", "--out", out, "--heal")
    assert (called["path"], called["teacher"]) == (out, None)


@pytest.mark.parametrize("init", [None, "project", "least_squares"])
def test_without_the_option_a_folder_without_weights_is_an_error_that_names_it(
    bare: Path, tmp_path: Path, init: str | None
) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(json.dumps(KPHI3))
    with pytest.raises(CheckpointError) as caught:
        api.convert(bare, recipe, tmp_path / "out", init=init)
    assert "--init random" in str(caught.value)
    assert str(bare) in str(caught.value)
    given = () if init is None else ("--init", init)
    result = run("convert", bare, "--recipe", recipe, "--out", tmp_path / "out", *given)
    assert result.exit_code != 0
    assert "--init random" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_method_that_does_not_exist_is_the_error(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nonsense"):
        api.convert(bare, KPHI3, tmp_path / "out", init="nonsense")


@pytest.mark.parametrize(
    "name",
    ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"],
)
def test_weights_that_are_broken_are_never_replaced_by_random_ones(
    bare: Path, tmp_path: Path, name: str
) -> None:
    (bare / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError) as caught:
        api.convert(bare, KPHI3, tmp_path / "out", init="random")
    assert "--init random" not in str(caught.value)


def test_how_absent_weights_were_quantised_is_forgotten(bare: Path, tmp_path: Path) -> None:
    config = json.loads((bare / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (bare / "config.json").write_text(json.dumps(config))
    made = drawn(bare, tmp_path / "out", DENSE, seed=5)
    assert same(made, by_transformers(5))
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_there_is_nothing_to_resume(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="without weights"):
        api.convert(bare, KPHI3, tmp_path / "out", init="random", resume=True)


def test_a_published_kphi3_config_is_drawn_too(tmp_path: Path) -> None:
    published = {**SIZES, "model_type": "kphi3", "embed_size": 96, "min_channels_per_group": 24}
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(published))
    made = drawn(tmp_path / "bare", tmp_path / "out", None, init="random_published")
    weight = made["model.layers.0.self_attn.o_proj.weight"]
    _, both, outputs = weight.shape
    bound = 1 / math.sqrt(both // 2 * outputs)
    assert 0.9 * bound < float(weight.abs().max()) <= bound


def test_every_architecture_is_drawn_as_transformers_does(tmp_path: Path) -> None:
    for architecture in ("llama", "gpt2", "bloom"):
        config = tiny_config(architecture)
        config.save_pretrained(tmp_path / architecture)
        keep = {"replace": [{"match": "*", "keep": True}]}
        made = drawn(tmp_path / architecture, tmp_path / f"{architecture}-out", keep, seed=2)
        torch.manual_seed(2)
        assert same(made, AutoModelForCausalLM.from_config(config).state_dict()), architecture
