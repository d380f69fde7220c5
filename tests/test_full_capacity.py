"""Where a block can hold the dense matrix, every way of fitting must end at it, up to rounding.

Truth: the dense model itself, on tokens that no fit has seen. In float64, so that what is damped,
shrunk, rounded on the way or put in the wrong order cannot hide.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from every_architecture import NOT_FITTED, config_classes, tiny_model
from test_every_architecture import TINY
from tiny import few
from transformers.pytorch_utils import Conv1D

from llmslim import fitting, planning
from llmslim.anatomy.layer_calls import fast_type
from llmslim.anatomy.sites import Site, find_experts, find_layers, find_sites
from llmslim.fitting import layerwise
from llmslim.modeling.sizes import common_divisors
from llmslim.recipe import Recipe
from llmslim.report.report import Report

pytestmark = pytest.mark.filterwarnings("ignore")  # what other people's models warn of
CLASSES = config_classes()
IDS = torch.randint(3, 90, (12, 16), generator=torch.Generator().manual_seed(2))
TEXT, UNSEEN = fitting.TokenWindows(IDS[:6], IDS[6:8]), IDS[8:]

NOT_FLOAT64 = {"inkling2_text", "xglm"}
"""What transformers' own code does not run in float64."""
TYPICAL = (
    "bart",  # projections that text alone never reaches
    "gpt2",  # transposed maps
    "gpt_oss",  # experts, stacked the other way round
    "llama",
    "mixtral",  # experts
    "olmo2",  # outputs that are normalised before they are added
    "phi3",  # gate and up in one
    "zamba",  # maps that layers share
)


def dense_model(name: str, dtype: torch.dtype = torch.float64) -> Any:
    model = tiny_model(CLASSES[name]).to(dtype)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the fused kernels have no float64
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=UNSEEN, use_cache=False).logits
    return found.double()


def apart(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours - truth).norm() / truth.norm())


def sites_of(model: Any) -> dict[str, Site]:
    inside = f"{find_layers(model).path}."
    found = {**find_sites(model), **find_experts(model)}
    return {name: site for name, site in found.items() if name.startswith(inside)}


def with_everything_kept(structure: str, site: Site) -> dict[str, Any] | None:
    """Return options with which a block holds any matrix of a site's sizes, if there are any."""
    rank = min(site.in_features, site.out_features)
    if structure == "low_rank":
        return {"structure": structure, "rank": rank}
    _, *divisors = common_divisors(site.in_features, site.out_features)
    if not divisors:
        return None
    if structure == "block_shuffle":
        sizes = {"blocks": divisors[0], "inner_features": divisors[0] * rank}
    else:
        sizes = {"groups": divisors[0], "rank": rank}
    return {"structure": structure, **sizes}


def slimmed(
    model: Any, init: str, rules: dict[str, Any], calibration: fitting.TokenWindows = TEXT
) -> Report:
    """Carry out one rule for each site, in place."""
    replace = [{"match": name, **rule} for name, rule in rules.items()]
    plan = planning.plan(model, Recipe.of({"name": "f", "init": init, "replace": replace}))
    text = calibration if init == "least_squares" else None
    return fitting.rewrite(model, plan, calibration=text)


def given_back(
    model: Any, init: str, structure: str, calibration: fitting.TokenWindows = TEXT
) -> float:
    """Put blocks of full capacity in place; return how far the logits moved."""
    dense, rules = logits(model), {}
    for name, site in sites_of(model).items():
        rule = with_everything_kept(structure, site)
        if rule is not None:
            rules[name] = rule
    report = slimmed(model, init, rules, calibration)
    assert sum(row.action == "replaced" for row in report.rows) == len(rules) > 0
    return apart(logits(model), dense)


@pytest.mark.parametrize("init", ["project", "least_squares"])
@pytest.mark.parametrize("structure", ["low_rank", "block_shuffle", "grouped_low_rank"])
def test_every_structure_gives_the_dense_model_back(structure: str, init: str) -> None:
    assert given_back(dense_model("mixtral"), init, structure) < 1e-12


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in TYPICAL else pytest.mark.slow)
        for name in sorted(set(TINY) - NOT_FITTED.keys())
    ],
)
def test_every_architecture_is_given_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "fast_type", lambda *_: None)
    dtype, rounding = (torch.float32, 1e-5) if name in NOT_FLOAT64 else (torch.float64, 1e-12)
    assert given_back(dense_model(name, dtype), "least_squares", "low_rank") < rounding


@pytest.mark.parametrize("name", ["bart", "gpt2", "llama", "olmo2", "zamba"])
def test_without_held_out_text_the_step_itself_leads_nowhere(name: str) -> None:
    """Held-out text would take a wrong step back, so that none could be seen."""
    alone = fitting.TokenWindows(TEXT.windows, TEXT.held_out[:0])
    assert given_back(dense_model(name), "least_squares", "low_rank", alone) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(TINY) - {"hrm_text"}))
def test_every_architecture_is_given_back_without_text(name: str) -> None:
    dtype, rounding = (torch.float32, 1e-5) if name in NOT_FLOAT64 else (torch.float64, 1e-12)
    assert given_back(dense_model(name, dtype), "project", "low_rank") < rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bloom", "gpt2", "llama"])
def test_what_is_left_is_the_rounding_of_the_type(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truth: the same weights in float64. A block is two products where the map was one."""
    monkeypatch.setattr(layerwise, "fast_type", lambda *_: None)
    model = dense_model(name, dtype)
    own = apart(logits(model), logits(copy.deepcopy(model).double()))
    assert 0 < own < 4 * torch.finfo(dtype).eps
    assert given_back(model, "least_squares", "low_rank") < 3 * own


def test_what_faster_products_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded by what bfloat16 rounds away in one forward pass of the same model."""
    monkeypatch.setattr(layerwise, "fast_type", lambda *_: torch.bfloat16)
    model = dense_model("llama", torch.float32)
    rounding = apart(logits(copy.deepcopy(model).bfloat16()), logits(model))
    assert 1e-6 < given_back(model, "least_squares", "low_rank") < 2 * rounding


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_in_float64_is_fitted_in_it(device: str) -> None:
    assert fast_type(torch.device(device), torch.float64) is None


HOLDS_SOME: dict[str, dict[str, Any]] = {
    "low_rank": {"structure": "low_rank", "keep_ratio": 0.5},
    "pivoted_low_rank": {"structure": "pivoted_low_rank", "keep_ratio": 0.5},
    "block_shuffle": {"structure": "block_shuffle", "keep_ratio": 0.5},
    "io": {"structure": "grouped_pointwise", "groups": 4},
    "io, learned order": {
        "structure": "grouped_pointwise",
        "groups": 4,
        "channel_order": "learned",
    },
}


@pytest.mark.parametrize("init", ["project", "least_squares"])
@pytest.mark.parametrize("kind", HOLDS_SOME)
@pytest.mark.parametrize("name", few(["llama", "mixtral"]))
def test_matrices_that_a_block_can_hold_are_kept(name: str, kind: str, init: str) -> None:
    """Blocks of half the weights, for a model whose matrices are such blocks already."""
    model = dense_model(name)
    rules = dict.fromkeys(sites_of(model), HOLDS_SOME[kind])
    blocks = copy.deepcopy(model)
    slimmed(blocks, "project", rules)
    for at, site in sites_of(model).items():
        block: Any = blocks.get_submodule(at)
        if site.experts:
            model.get_parameter(at).data.copy_(block.to_dense())
            continue
        module: Any = model.get_submodule(at)
        weight_OI = block.to_dense()
        module.weight.data.copy_(weight_OI.T if isinstance(module, Conv1D) else weight_OI)
    dense = logits(model)
    slimmed(model, init, rules)
    assert apart(logits(model), dense) < 1e-11


def test_neurons_that_are_of_no_use_take_nothing_with_them() -> None:
    model = dense_model("llama")
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.down_proj.weight[:, ::2] = 0
    dense = logits(model)
    rule = {"match": "*.mlp.*", "structure": "width", "keep_ratio": 0.5}
    recipe = Recipe.of({"name": "w", "init": "least_squares", "replace": [rule]})
    fitting.rewrite(model, planning.plan(model, recipe), calibration=TEXT)
    assert model.config.intermediate_size == 48
    assert apart(logits(model), dense) < 1e-12
