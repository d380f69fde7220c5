"""Experts fitted to the tokens routed to them: against loops and solutions written here."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from every_architecture import config_classes, logits, tiny_model
from tiny import few
from torch import Tensor, nn
from torch.nn.functional import silu

from llmslim import fitting, planning
from llmslim.anatomy import sites
from llmslim.anatomy.sites import find_experts
from llmslim.fitting import experts as expert_fits
from llmslim.fitting import layerwise
from llmslim.fitting.calibration import TokenWindows
from llmslim.fitting.experts import Watched, fit_experts, watching
from llmslim.init import GramAccumulator
from llmslim.modeling.experts import Experts
from llmslim.recipe import Recipe
from llmslim.report.report import Report

MIXTURES = [
    "mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "olmoe", "deepseek_v3", "llama4_text",
    "jetmoe", "nemotron_h", "aria_text",
]  # fmt: skip
LOOPS = ["mixtral", "gpt_oss", "llama4_text"]
"""One of each kind: F.linear for each expert, transposed with biases, a product over all."""
CLASSES = config_classes()
HALF = {"structure": "low_rank", "keep_ratio": 0.5}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run layers in float32 whatever the processor is fast at."""
    monkeypatch.setattr(layerwise, "fast_type", lambda *_: None)


def calibration(windows: int = 20, length: int = 16) -> TokenWindows:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (windows + 6, length), generator=generator)
    return TokenWindows(ids[:windows], ids[windows:])


def slimmed(
    name: str,
    *rules: dict[str, Any],
    text: TokenWindows | None = None,
    model: Any = None,
    **more: Any,
) -> tuple[Any, Report]:
    model = model if model is not None else tiny_model(CLASSES[name])
    recipe = Recipe.of({"init": "least_squares", "replace": list(rules), **more})
    plan = planning.plan(model, recipe)
    return model, fitting.rewrite(model, plan, calibration=text or calibration())


def experts_at(model: Any, layer: int) -> dict[str, str]:
    """Return the names of a layer's stacks by their last part."""
    names = [name for name in find_experts(model) if f"layers.{layer}." in name]
    return {name.rpartition(".")[2]: name for name in names}


@torch.no_grad()
def routed(name: str, model: Any, ids: Tensor) -> list[Tensor]:
    """Return what each expert of layer 0 is given, by the router's own choice."""
    found: list[Any] = []
    if name == "llama4_text":
        moe = model.model.layers[0].feed_forward
        moe.router.register_forward_hook(lambda _m, args, out: found.append((args[0], out[1])))
        model(input_ids=ids, use_cache=False)
        x, scores = found[0]
        top = scores.topk(moe.top_k, dim=-1)
        x_TKD = x[:, None] * top.values.sigmoid()[..., None]
        return [x_TKD[top.indices == expert] for expert in range(moe.num_experts)]
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _m, args: found.append(args[:2]))
    model(input_ids=ids, use_cache=False)
    x, index = found[0]
    return [x[(index == expert).any(-1)] for expert in range(experts.num_experts)]


@torch.no_grad()
def activated(name: str, model: Any, expert: int, up: Tensor) -> Tensor:
    """Return what an expert's down projection reads, given what its first matrix makes."""
    if name != "gpt_oss":
        gate, value = up.chunk(2, dim=-1)
        return silu(gate) * value
    experts = model.model.layers[0].mlp.experts
    up = up + experts.gate_up_proj_bias[expert]
    gate, value = up[:, ::2].clamp(max=7.0), up[:, 1::2].clamp(-7.0, 7.0)
    return (value + 1) * gate * torch.sigmoid(1.702 * gate)


def as_linear(stack: Tensor, name: str) -> Tensor:
    """Return a stack as (E, O, I), float64."""
    return (stack if name == "mixtral" else stack.transpose(1, 2)).double()


def nearest(weight: Tensor, own: Tensor, everything: Tensor, rank: int) -> Tensor:
    """Return the matrix of that rank with the least error on an expert's tokens; all float64.

    The Gram matrix is the expert's, that of all tokens if it has none, damped by a tenth of the
    median channel's power.
    """
    x = own if len(own) else everything
    gram = x.T @ x / len(x)
    gram = gram + 0.1 * gram.diagonal().median() * torch.eye(len(gram), dtype=torch.float64)
    factor = torch.linalg.cholesky(gram)
    u, s, vt = torch.linalg.svd(weight @ factor)
    return u[:, :rank] * s[:rank] @ vt[:rank] @ torch.linalg.inv(factor)


# ----------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_of_full_rank_give_the_dense_model_back(name: str) -> None:
    model = tiny_model(CLASSES[name])
    dense, sites = logits(model), find_experts(model)
    rules = [
        {"match": site, "structure": "low_rank", "rank": min(s.in_features, s.out_features)}
        for site, s in sites.items()
    ]
    _, report = slimmed(name, *rules, model=model)
    errors = [row.init_error for row in report.rows if row.action == "replaced"]
    assert len(errors) == len(sites) > 0
    assert all(error is not None and error < 1e-9 for error in errors)
    torch.testing.assert_close(logits(model), dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", few(MIXTURES, ("qwen3_moe", "gpt_oss", "jetmoe")))
def test_fitted_is_nearer_than_projected(name: str) -> None:
    dense = logits(tiny_model(CLASSES[name]))
    apart, errors = {}, {}
    for init in ("project", "least_squares"):
        model = tiny_model(CLASSES[name])
        rules = [{"match": list(find_experts(model)), **HALF, "init": init}]
        # One projection is fitted in either case, without loss: errors are of held-out tokens.
        whole = next(s for n, s in sites.find_sites(model).items() if "layers.0." in n)
        rank = min(whole.in_features, whole.out_features)
        rules.append({"match": whole.name, "structure": "low_rank", "rank": rank})
        _, report = slimmed(name, *rules, model=model)
        rows = [r for r in report.rows if r.action == "replaced" and r.name != whole.name]
        errors[init] = sum(row.init_error or 0.0 for row in rows)
        apart[init] = float((logits(model) - dense).norm())
    assert errors["least_squares"] < 0.97 * errors["project"]
    assert apart["least_squares"] < 0.97 * apart["project"]


def test_layers_with_everything_replaced_and_refined() -> None:
    everything = {"match": ["*attn*", "*mlp*"], **HALF}
    model, report = slimmed("mixtral", everything)
    refined, again = slimmed("mixtral", everything, refine={"steps": 4})
    assert logits(model).isfinite().all()
    assert not torch.equal(logits(refined), logits(model))
    for each in (report, again):
        errors = [row.init_error for row in each.rows if row.action == "replaced"]
        assert len(errors) > 8
        assert all(error is not None and 0 < error < 2 for error in errors)


def test_another_implementation_of_experts_fits_the_same() -> None:
    found = []
    for implementation in ("eager", "batched_mm"):
        model = tiny_model(CLASSES["mixtral"])
        model.set_experts_implementation(implementation)
        slimmed("mixtral", {"match": "*.0.*experts.*", **HALF}, model=model)
        found.append(logits(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------- each expert


@pytest.fixture
def text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit the first layer to the calibration text and nothing else, so that its best is known."""
    monkeypatch.setattr(layerwise, "with_random_tokens", lambda windows, *_args: windows[:0])


@pytest.mark.usefixtures("text_alone")
@pytest.mark.parametrize("name", LOOPS)
def test_each_expert_is_the_best_for_its_tokens(name: str) -> None:
    """Truth: the singular value decomposition of the weight on the tokens, for each expert."""
    text, dense = calibration(60), tiny_model(CLASSES[name])
    model, _ = slimmed(name, {"match": "*experts.*_proj", **HALF}, text=text)
    seen = [x.double() for x in routed(name, dense, text.windows)]
    at = experts_at(dense, 0)
    for leaf in ("gate_up_proj", "down_proj"):
        stack = as_linear(dense.get_parameter(at[leaf]).data, name)
        blocks: Any = model.get_submodule(at[leaf])
        everything = torch.cat(seen)
        assert len(everything) == 60 * 16 * (1 if name == "llama4_text" else 2)
        for expert, x in enumerate(seen):
            best = nearest(stack[expert], x, everything, blocks.block_spec["rank"])
            ours = blocks.block(expert).to_dense().double()
            wanted, error = x @ stack[expert].T, x @ (ours - best).T
            assert error.norm() < 2e-3 * wanted.norm()
            if leaf == "gate_up_proj":
                seen[expert] = activated(name, dense, expert, x @ ours.T)


@pytest.mark.parametrize("name", few(LOOPS, ("mixtral", "gpt_oss")))
def test_errors_are_those_of_held_out_tokens(name: str) -> None:
    """Truth: every expert's outputs, dense and slim, on the held-out tokens sent to it."""
    text, dense = calibration(), tiny_model(CLASSES[name])
    model, report = slimmed(name, {"match": "*experts.*_proj", **HALF}, text=text)
    rows = {row.name: row for row in report.rows}
    seen = [x.double() for x in routed(name, dense, text.held_out)]
    for leaf in ("gate_up_proj", "down_proj"):
        at, lost, power = experts_at(dense, 0)[leaf], 0.0, 0.0
        stack = as_linear(dense.get_parameter(at).data, name)
        blocks: Any = model.get_submodule(at)
        for expert, x in enumerate(seen):
            ours = x @ blocks.block(expert).to_dense().double().T
            wanted = x @ stack[expert].T
            lost, power = lost + (ours - wanted).square().sum(), power + wanted.square().sum()
            if leaf == "gate_up_proj":
                seen[expert] = activated(name, dense, expert, ours)
        assert rows[at].init_error == pytest.approx(float(lost / power), rel=1e-3)


@pytest.mark.usefixtures("text_alone")
@pytest.mark.parametrize("gram_bytes", [expert_fits.GRAM_BYTES, 1])  # in one pass, and in several
def test_an_expert_without_tokens_is_fitted_to_those_of_the_others(
    gram_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_fits, "GRAM_BYTES", gram_bytes)
    text, dense = calibration(), tiny_model(CLASSES["gpt_oss"])
    dense.model.layers[0].mlp.router.bias.data[2] = -1e4  # never chosen
    model = tiny_model(CLASSES["gpt_oss"])
    model.load_state_dict(dense.state_dict())
    _, report = slimmed("gpt_oss", {"match": "*.0.*experts.*_proj", **HALF}, model=model, text=text)
    assert sum("of 4 experts saw fewer" in note for note in report.problems) == 2
    seen = routed("gpt_oss", dense, text.windows)
    assert len(seen[2]) == 0
    blocks: Any = model.model.layers[0].mlp.experts.gate_up_proj
    stack = as_linear(dense.model.layers[0].mlp.experts.gate_up_proj.data, "gpt_oss")
    best = nearest(stack[2], seen[2].double(), torch.cat(seen).double(), blocks.block_spec["rank"])
    ours = blocks.block(2).to_dense().double()
    assert (ours - best).norm() < 1e-3 * best.norm()


@pytest.mark.parametrize("length", [1, 3])
def test_hardly_any_token_gives_a_finite_fit(length: int) -> None:
    dense = logits(tiny_model(CLASSES["mixtral"]))
    text = calibration(1, length)
    model, report = slimmed("mixtral", {"match": "*experts.*", **HALF}, text=text)
    assert any("4 of 4 experts saw fewer" in note for note in report.problems)
    assert float((logits(model) - dense).norm()) < float(dense.norm())


# ----------------------------------------------------------------------------- memory


def test_what_does_not_fit_is_gathered_in_more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[GramAccumulator] = weakref.WeakSet()
    most = 0

    class Counted(GramAccumulator):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            nonlocal most
            super().__init__(*args, **kwargs)
            alive.add(self)
            most = max(most, len(alive))

    monkeypatch.setattr(expert_fits, "GramAccumulator", Counted)
    rule = {"match": "*.0.*experts.*", **HALF}
    at_once, _ = slimmed("mixtral", rule)
    assert most >= 4  # experts
    most = 0
    monkeypatch.setattr(expert_fits, "GRAM_BYTES", 1)
    one_by_one, _ = slimmed("mixtral", rule)
    assert most <= 2  # one for an expert, one for all
    ours, theirs = one_by_one.state_dict(), at_once.state_dict()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------- the stand-in


@pytest.mark.parametrize("transposed", [False, True])
def test_the_stand_in_computes_what_the_parameter_does(transposed: bool) -> None:
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 5, 4))
    watched = Watched(stack, transposed=transposed)
    assert watched.shape == stack.shape
    inputs = 5 if transposed else 4
    x, each = torch.randn(7, inputs), torch.randn(3, 7, inputs)
    right = stack if transposed else stack.transpose(1, 2)
    ours = watched if transposed else watched.transpose(1, 2)
    torch.testing.assert_close(torch.bmm(each, ours), torch.bmm(each, right))
    one = watched[1] if transposed else watched[1].T
    torch.testing.assert_close(x @ one, x @ right[1])


def test_a_row_of_zeros_is_a_token_of_another_expert() -> None:
    """Where all experts are given all tokens, those that are not theirs are zeroed."""
    stack = Watched(nn.Parameter(torch.randn(2, 5, 4)))
    x = torch.randn(2, 3, 4)
    x[0, 1:] = 0
    moments = expert_fits._gather(stack, lambda: stack(x, None), range(2))
    assert [moments[expert].tokens for expert in range(2)] == [1, 3]
    torch.testing.assert_close(moments[0].gram_II.float(), x[0, 0].outer(x[0, 0]))


def test_the_stack_comes_back_when_a_run_fails() -> None:
    model = tiny_model(CLASSES["mixtral"])
    before = dict(model.named_parameters())
    plan = planning.plan(model, Recipe.of({"replace": [{"match": "*experts.*", **HALF}]}))

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_experts(model, plan.sites[0], fail, lambda _name: 0)
    with watching(model, plan.sites):
        assert sum(isinstance(module, Experts) for module in model.modules()) == 4
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
