"""Fitting layer by layer to calibration tokens: against the dense model, lstsq and brute force."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import tiny_tokenizer
from helpers_fitting import MLP, WINDOWS, distance, rows_of
from helpers_fitting import in_full_precision as in_full_precision
from tiny import ARCHITECTURES, few, logits, tiny_model, tokens

import llmslim
from llmslim import DataError, SlimError, TargetError, fitting, planning
from llmslim.anatomy.layer_calls import record_calls, run_layer
from llmslim.anatomy.sites import find_layers
from llmslim.data import Windows
from llmslim.fitting import layerwise
from llmslim.fitting.layer_pair import LayerPair

KEYS_VALUES = ["*.k_proj", "*.v_proj"]
SEPARATE = {"llama", "qwen2", "qwen3", "gemma", "mistral", "opt"}
"""Architectures with key and value projections of their own."""
SHORT = Windows(tokens(64, 16), "random tokens", tokens(4, 16, seed=5))
"""As long as the texts that `distance` compares on: for fits that win little."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_rank_blocks_give_the_dense_model_back(architecture: str) -> None:
    """Whatever target a block is given, one that can reach it must end at the dense function."""
    rules = [{"match": ["*layers.*", "*.h.*"], "structure": "low_rank", "rank": 48}]
    if architecture in SEPARATE:
        rank = 48 if architecture == "opt" else 24
        rules.insert(0, {"match": KEYS_VALUES, "structure": "low_rank", "rank": rank})
    model, dense = tiny_model(architecture), tiny_model(architecture)
    report = llmslim.slim(model, {"init": "least_squares", "replace": rules}, calibration=WINDOWS)
    assert report.fitted_to == "1,024 tokens of random tokens, with errors measured on 64 others"
    assert distance(model, dense) < 1e-4
    errors = [row.init_error for row in report.rows if row.action == "replaced"]
    assert len(errors) >= 4 * 4
    assert max(errors) < 1e-6


@pytest.mark.parametrize("architecture", few(ARCHITECTURES))
@pytest.mark.parametrize(
    "rule",
    [
        {"structure": "low_rank", "keep_ratio": 0.5},
        {"structure": "grouped_pointwise", "groups": 4},
        {"structure": "width", "keep_ratio": 0.5},
    ],
    ids=lambda rule: rule["structure"],
)
def test_fitted_is_nearer_than_projected(architecture: str, rule: dict[str, Any]) -> None:
    dense = tiny_model(architecture)
    apart = {}
    for init in ("project", "least_squares"):
        model = tiny_model(architecture)
        recipe = {"init": init, "replace": [{"match": MLP, **rule}]}
        llmslim.slim(model, recipe, calibration=WINDOWS)
        apart[init] = distance(model, dense)
    assert apart["least_squares"] < apart["project"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_run_alone_are_the_model(architecture: str) -> None:
    model = tiny_model(architecture)
    stack: Any = model.get_submodule(find_layers(model).path)
    batches = [ids[None] for ids in tokens(3, 12)]
    last: list[torch.Tensor] = []
    handle = stack[-1].register_forward_hook(
        lambda _m, _a, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    for batch in batches:
        logits(model, batch)
    handle.remove()
    calls = record_calls(model, list(stack), batches)
    assert len(calls.extras) == len(stack)
    for window, (hidden, expected) in enumerate(zip(calls.hidden, last, strict=True)):
        for layer, extras in zip(stack, calls.extras, strict=True):
            hidden, _ = run_layer(layer, hidden, extras[window])
        assert torch.allclose(hidden, expected, atol=1e-5)
    assert torch.equal(logits(model, batches[0]), logits(tiny_model(architecture), batches[0]))


def refusal(model: Any) -> str:
    """Return what is said where a model's layers cannot be run one by one."""
    layers = list(model.get_submodule(find_layers(model).path))
    with pytest.raises(TargetError) as reported:
        record_calls(model, layers, [ids[None] for ids in tokens(2, 12)])
    (problem,) = reported.value.problems
    assert problem.startswith(f"{type(model).__name__}: ")
    assert problem.endswith("Use init: project, and no structure auto.")
    # The model is as it was.
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in layers)
    return problem


def test_layers_that_run_twice_are_refused() -> None:
    model = tiny_model("llama")
    first, second = model.model.layers[:2]

    def once_more(_module: Any, args: Any, kwargs: Any) -> None:
        first(*args, **kwargs)

    second.register_forward_pre_hook(once_more, with_kwargs=True)
    assert "do not run once each, in the order of their list" in refusal(model)


def test_what_happens_between_layers_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[2].register_forward_pre_hook(lambda _m, args: (args[0] / 2, *args[1:]))
    assert "more than its list of layers works on" in refusal(model)


def test_layers_that_read_keys_and_values_of_others_are_refused() -> None:
    model = tiny_model("llama")
    model.config.num_kv_shared_layers = 2
    assert "read keys and values of earlier ones" in refusal(model)


def test_code_that_stumbles_over_stand_ins_is_named() -> None:
    model = tiny_model("llama")

    def two(_module: Any, _args: Any, output: torch.Tensor) -> Any:
        return {"hidden": output}["states"]

    model.model.embed_tokens.register_forward_hook(two)
    assert "its layers cannot be run one by one (KeyError: 'states')" in refusal(model)


def test_errors_are_those_of_held_out_tokens() -> None:
    """Truth: the outputs themselves, dense and slim, on the held-out windows."""
    model, dense = tiny_model("llama"), tiny_model("llama")
    recipe = {
        "init": "least_squares",
        "replace": [{"match": "*.up_proj", "structure": "low_rank", "rank": 8}],
    }
    report = llmslim.slim(model, recipe, calibration=WINDOWS)
    outputs: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for either in (model, dense):
        for layer, keep in zip(either.model.layers, outputs, strict=True):
            layer.mlp.up_proj.register_forward_hook(lambda _m, _a, y, keep=keep: keep.append(y))
        logits(either, WINDOWS.held_out)
    for row, (slim, wanted) in zip(rows_of(report, "up_proj"), outputs, strict=True):
        error = (slim - wanted).square().sum() / wanted.square().sum()
        assert row.init_error == pytest.approx(float(error), rel=1e-3)


def test_each_layer_repairs_what_the_ones_before_broke() -> None:
    """With layer 0's MLP ruined, fitting layer 1's to the residual target must win some back."""
    dense, apart = tiny_model("llama"), {}
    ruin = {"match": "*.0.mlp.*", "structure": "low_rank", "rank": 2}
    for name, rank in (("left", None), ("fitted", 48)):
        model = tiny_model("llama")
        rules: list[dict[str, Any]] = [ruin]
        if rank:
            rules.append({"match": "*.1.mlp.*", "structure": "low_rank", "rank": rank})
        llmslim.slim(model, {"init": "least_squares", "replace": rules}, calibration=SHORT)
        apart[name] = distance(model, dense)
    # Fitted to its own dense output instead, it would come out as it was: the rank is full.
    assert apart["fitted"] < 0.99 * apart["left"]


def test_with_dropped_layers_the_next_one_repairs() -> None:
    dense = tiny_model("llama")
    apart = {}
    for init in ("project", "least_squares"):
        model = tiny_model("llama")
        recipe = {
            "init": init,
            "depth": {"keep_layers": [0, 2, 3]},
            "replace": [{"match": "*.mlp.*", "structure": "low_rank", "rank": 48}],
        }
        llmslim.slim(model, recipe, calibration=SHORT)
        assert len(model.model.layers) == 3
        apart[init] = distance(model, dense)
    assert apart["least_squares"] < 0.95 * apart["project"]


def test_training_mode_and_random_state_are_left_alone() -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    recipe = {
        "init": "least_squares",
        "replace": [{"match": "*.mlp.*", "structure": "low_rank", "rank": 8}],
    }
    state = torch.random.get_rng_state()
    llmslim.slim(model, recipe, calibration=WINDOWS)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())


LOW_RANK: dict[str, Any] = {
    "init": "least_squares",
    "replace": [{"match": "*.mlp.*", "structure": "low_rank", "rank": 8}],
}


def test_a_plan_that_needs_calibration_is_not_carried_out_without() -> None:
    model = tiny_model("llama")
    with pytest.raises(DataError, match="init: "):
        fitting.rewrite(model, llmslim.plan(model, LOW_RANK))
    assert type(model).__name__ == "LlamaForCausalLM"


def test_slim_draws_the_recipes_calibration_text_itself() -> None:
    spec = {"tokens": 256, "sequence_length": 16}
    report = llmslim.slim(tiny_model("llama"), {**LOW_RANK, "calibration": spec})
    assert all(r.init_error is not None for r in report.rows if r.action == "replaced")


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        ({"match": "lm_head", "structure": "low_rank", "rank": 4}, "lm_head"),
        ({"match": "*.mlp.*", "structure": "width"}, "keep_ratio"),
        ({"match": "*.o_proj", "structure": "width", "keep_ratio": 0.5}, "o_proj"),
        ({"match": "*.down_proj", "structure": "width", "keep_ratio": 0.5}, "down_proj"),
        ({"match": "*.mlp.*", "structure": "width", "groups": 4}, "groups"),
    ],
)
def test_rules_that_cannot_be_fitted(rule: dict[str, Any], named: str) -> None:
    with pytest.raises(SlimError, match=rf"replace\[0\].*{named}"):
        llmslim.plan(tiny_model("llama"), {"init": "least_squares", "replace": [rule]})


def test_non_finite_activations_are_an_answer_or_an_error() -> None:
    """A token whose hidden states overflow is left out of the fit, and of nothing else."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("inf")
    lost = [int((row == 7).any()) for row in WINDOWS.ids]
    assert 0 < sum(lost) < len(lost)
    recipe = {
        "init": "least_squares",
        "replace": [{"match": "*.mlp.*", "structure": "low_rank", "rank": 8}],
    }
    report = llmslim.slim(model, recipe, calibration=WINDOWS)
    assert any("calibration tokens left out" in note for note in report.problems)
    assert all(p.isfinite().all() for layer in model.model.layers for p in layer.parameters())


def test_in_bfloat16_full_rank_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "fast_type", lambda *_: torch.bfloat16)
    model, dense = tiny_model("llama"), tiny_model("llama")
    rules = [{"match": "*.mlp.*", "structure": "low_rank", "rank": 48}]
    llmslim.slim(model, {"init": "least_squares", "replace": rules}, calibration=WINDOWS)
    assert 0 < distance(model, dense) < 0.05


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_layer_norms_in_bfloat16_take_the_float32_stream(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "fast_type", lambda *_: torch.bfloat16)
    dense = tiny_model(architecture)
    apart = {}
    for init in ("project", "least_squares"):
        model = tiny_model(architecture).bfloat16()
        rule = {"match": MLP, "structure": "low_rank", "keep_ratio": 0.5}
        llmslim.slim(model, {"init": init, "replace": [rule]}, calibration=WINDOWS)
        apart[init] = distance(model.float(), dense)
    assert apart["least_squares"] < apart["project"]


def test_convert_reads_calibration_text(tmp_path: Path) -> None:
    """The whole way: a folder with a tokenizer, a text file, a checkpoint with held-out errors."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    llmslim.save(model, tmp_path / "dense", tokenizer=tokenizer)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    rule = {"match": "*.mlp.*", "structure": "pivoted_low_rank", "keep_ratio": 0.5}
    recipe = {"calibration": {"data": "elsewhere", "sequence_length": 16}, "replace": [rule]}
    made = llmslim.convert(
        tmp_path / "dense",
        recipe,
        tmp_path / "slim",
        calibration=[str(text), "self"],
        calibration_tokens=1024,
    )
    # Half of them each, in windows of 16, of which two are held out.
    text = "960 tokens of text.txt, the dense model's own text, with errors measured on 64 others"
    assert made.report.fitted_to == text
    assert f"Fitted to {text}." in (tmp_path / "slim" / "README.md").read_text(encoding="utf-8")
    errors = [row.init_error for row in made.report.rows if row.action == "replaced"]
    assert len(errors) == 12
    assert all(0 < error < 1 for error in errors)
    assert llmslim.verify(tmp_path / "slim").ok
    assert type(llmslim.load(tmp_path / "slim")).__name__ == "SlimLlamaForCausalLM"


@pytest.mark.parametrize("structure", ["low_rank", "width"])
def test_the_streams_of_a_layer_are_let_go_with_it(
    structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: list[weakref.ref[LayerPair]] = []

    class Watched(LayerPair):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            assert all(pair() is None for pair in pairs)
            pairs.append(weakref.ref(self))

    monkeypatch.setattr(layerwise, "LayerPair", Watched)
    recipe = llmslim.Recipe.of(
        {
            "name": "r",
            "init": "least_squares",
            "replace": [{"match": "*.mlp.*", "structure": structure, "keep_ratio": 0.5}],
        }
    )
    model = tiny_model(num_hidden_layers=8)
    gc.disable()
    try:
        calibration = fitting.TokenWindows(tokens(6), tokens(2))
        fitting.rewrite(model, planning.plan(model, recipe), calibration=calibration)
    finally:
        gc.enable()
    assert len(pairs) == 8  # a layer each
