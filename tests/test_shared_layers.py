"""Calibrated fits where layers share a module, or are given more than hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from every_architecture import config_classes, logits, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmslim import fitting, planning
from llmslim.anatomy.layer_calls import record_calls, run_layer
from llmslim.anatomy.sites import dense_weight, find_layers, find_mlps, find_sites
from llmslim.editing.resize import keep_neurons
from llmslim.fitting import layerwise
from llmslim.fitting.calibration import TokenWindows
from llmslim.fitting.layer_store import LayerStore, Streams
from llmslim.recipe import Recipe
from llmslim.report.report import Report

SHARING = ["zamba", "zamba2"]
MORE_ARGUMENTS = [*SHARING, "gemma3n_text", "gemma4_text"]
"""Their layers are given what follows from the token ids: other arguments for every window."""
CLASSES = config_classes()
SHARED = ["*layers.1.shared_transf*attn.*", "*layers.1.shared_transf*.down_proj"]
HALF: dict[str, Any] = {"structure": "low_rank", "keep_ratio": 0.5}
GROUPED = {"structure": "grouped_pointwise", "groups": 4, "channel_order": "learned"}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run layers in float32 whatever the processor is fast at."""
    monkeypatch.setattr(layerwise, "fast_type", lambda *_: None)


def calibration(windows: int = 9) -> TokenWindows:
    ids = torch.randint(3, 90, (windows + 3, 12), generator=torch.Generator().manual_seed(0))
    return TokenWindows(ids[:windows], ids[windows:])


def rewrite(model: Any, *rules: dict[str, Any], windows: int = 9) -> Report:
    recipe = Recipe.of({"init": "least_squares", "replace": list(rules)})
    return fitting.rewrite(model, planning.plan(model, recipe), calibration=calibration(windows))


@torch.no_grad()
def outputs(model: Any, layer: int, ids: Tensor) -> list[Tensor]:
    """Return what a layer of the whole model makes of each window."""
    found: list[Tensor] = []
    stack: Any = model.get_submodule(find_layers(model).path)
    handle = stack[layer].register_forward_hook(
        lambda _m, _a, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    for window in ids:
        model(input_ids=window[None], use_cache=False)
    handle.remove()
    return found


@pytest.mark.parametrize("name", MORE_ARGUMENTS)
def test_layers_run_alone_are_the_model_for_every_window(name: str) -> None:
    model = tiny_model(CLASSES[name])
    stack: Any = model.get_submodule(find_layers(model).path)
    ids = calibration().windows[:3]
    calls = record_calls(model, list(stack), [window[None] for window in ids])
    for window, expected in enumerate(outputs(model, len(stack) - 1, ids)):
        hidden = calls.hidden[window]
        for layer, extras in zip(stack, calls.extras, strict=True):
            hidden, _ = run_layer(layer, hidden, extras[window])
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


def test_arguments_that_are_equal_are_kept_once() -> None:
    model = tiny_model(CLASSES["zamba"])
    stack: Any = model.get_submodule(find_layers(model).path)
    calls = record_calls(model, list(stack), [w[None] for w in calibration().windows[:3]])
    tensors = {
        id(value)
        for extras in calls.extras
        for args, named in extras
        for value in (*args, *named.values())
        if isinstance(value, Tensor) and value.shape == calls.hidden[0].shape
    }
    assert len(tensors) == 3  # the embeddings of each window, whatever the layer


@pytest.mark.parametrize("name", SHARING)
def test_full_rank_blocks_give_the_dense_model_back(name: str) -> None:
    model = tiny_model(CLASSES[name])
    dense = logits(model)
    sites = [s for n, s in find_sites(model).items() if "shared_transf" in n or ".linear" in n]
    assert len(sites) > 7
    rules = [
        {"match": s.name, "structure": "low_rank", "rank": min(s.in_features, s.out_features)}
        for s in sites
    ]
    report = rewrite(model, *rules)
    errors = [row.init_error for row in report.rows if row.action == "replaced"]
    assert len(errors) == len(sites)
    assert all(error is not None and error < 1e-6 for error in errors)
    torch.testing.assert_close(logits(model), dense, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("zamba", {"match": SHARED, **HALF}),
        ("zamba2", {"match": SHARED, **HALF}),
        # The neurons move, also those of the down projection that stays.
        ("zamba", {"match": ["*gate_proj", "*up_proj"], **GROUPED}),
    ],
    ids=["low_rank", "low_rank2", "learned_order"],
)
def test_the_dense_stream_stays_dense_where_a_shared_block_is_slim(
    name: str, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truth: the whole dense model, and the whole slim one, run with hooks."""
    streams: list[Streams] = []
    monkeypatch.setattr(
        LayerStore,
        "finished",
        lambda _self, _index, _fitted, after: (streams.append(after), after)[1],
    )
    text, model, dense = calibration(), tiny_model(CLASSES[name]), tiny_model(CLASSES[name])
    # The walk ends after the second layer that has the shared block: something is fitted there.
    own = next(n for n in find_sites(model) if ".3." in n and n.endswith(".linear"))
    report = rewrite(model, rule, {"match": own, **HALF})
    assert any("layers.3.shared" in row.name for row in report.rows if row.action == "tied")
    ids = torch.cat((text.windows, text.held_out))
    for ours, truth in ((streams[-1].dense, dense), (streams[-1].slim, model)):
        for window, expected in zip(ours, outputs(truth, 3, ids), strict=True):
            torch.testing.assert_close(window, expected, rtol=1e-3, atol=1e-3)
    apart = torch.cat(streams[-1].dense) - torch.cat(streams[-1].slim)
    assert apart.norm() > 5e-3 * torch.cat(streams[-1].dense).norm()


def test_neurons_of_a_shared_mlp_move_in_every_layer_that_has_it() -> None:
    model = tiny_model(CLASSES["zamba"])
    dense = logits(model)
    mlp = next(m for m in find_mlps(model, find_layers(model)) if "shared" in m.name)
    order = torch.randperm(mlp.width, generator=torch.Generator().manual_seed(0))
    keep_neurons(model, mlp, order, dense_weight(model.get_submodule(mlp.down))[:, order])
    torch.testing.assert_close(logits(model), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", [{"structure": "pivoted_low_rank", "keep_ratio": 0.5}, GROUPED])
@pytest.mark.parametrize("name", SHARING)
def test_an_order_of_channels_is_shared_too(
    name: str, rule: dict[str, Any], tmp_path: Path
) -> None:
    """It is stored, but no parameter."""
    model = tiny_model(CLASSES[name])
    made = planning.plan(model, Recipe.of({"replace": [{"match": "*shared_transf*", **rule}]}))
    assert fitting.rewrite(model, made).totals.params_after < made.report().totals.params_before
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["project", "least_squares"])
def test_a_shared_mlp_is_narrowed_once(init: str) -> None:
    model = tiny_model(CLASSES["zamba"])
    rule = {"match": "*feed_forward.*", "structure": "width", "keep_ratio": 0.5, "init": init}
    report = rewrite(model, rule)
    first, second = (model.model.layers[n].shared_transf.feed_forward for n in (1, 3))
    assert first.down_proj.in_features == 48
    assert second.down_proj is first.down_proj
    assert report.totals.params_after == sum(p.numel() for p in model.parameters())
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("model_type", ["gemma2", "olmo2"])
@pytest.mark.parametrize(
    "rule",
    [
        {"structure": "width", "keep_ratio": 0.5},
        {"structure": "low_rank", "keep_ratio": 0.45, "neurons": 0.5},
    ],
    ids=["narrower", "blocks in it"],
)
def test_an_mlp_whose_output_is_normalised_keeps_that_output(
    model_type: str, rule: dict[str, Any]
) -> None:
    """Truth: the down projection's outputs on held-out windows, dense, slim, and merely cut."""
    widths = {"match": "*.layers.0.mlp.*", **rule}
    found: dict[str, Tensor] = {}

    def output(model: Any, name: str) -> None:
        hook = model.model.layers[0].mlp.down_proj.register_forward_hook(
            lambda _m, _a, y: found.update({name: y.detach()})
        )
        model(input_ids=calibration(90).held_out)
        hook.remove()

    model = tiny_model(CLASSES[model_type])
    output(model, "dense")
    report = rewrite(model, widths, windows=90)
    output(model, "fitted")
    cut = tiny_model(CLASSES[model_type])
    made = planning.plan(cut, Recipe.of({"init": "project", "replace": [widths]}))
    fitting.rewrite(cut, made)
    output(cut, "cut")
    power = found["dense"].square().sum()
    errors = {name: float((y - found["dense"]).square().sum() / power) for name, y in found.items()}
    assert errors["fitted"] < errors["cut"]
    (row,) = [row for row in report.rows if row.name.endswith("layers.0.mlp.down_proj")]
    assert row.init_error == pytest.approx(errors["fitted"], rel=1e-3)
