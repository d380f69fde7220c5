"""Filling blocks from dense weights, against closed forms worked out another way."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_model

import llmslim
from llmslim import GroupedPointwise, LowRank, RecipeError
from llmslim.init import Target, initialise, method_named, method_names


def weight(out_features: int, in_features: int) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("in_features", "out_features", "groups"),
    [(24, 36, 4), (36, 24, 3), (16, 16, 4), (8, 8, 8)],
)
def test_project_io_keeps_exactly_the_entries_under_the_mask(
    in_features: int, out_features: int, groups: int
) -> None:
    w_OI = weight(out_features, in_features)
    mask = torch.zeros(out_features, in_features, dtype=torch.bool)
    o, i = out_features // groups, in_features // groups
    for row in range(out_features):
        for channel in range(in_features):
            group = row // o
            mask[row, channel] = channel // i == group or channel % groups == group
    block = GroupedPointwise(in_features, out_features, groups=groups)
    error = initialise(block, Target(w_OI), method_named("project"))
    assert torch.equal(block.to_dense(), w_OI * mask)
    expected = (w_OI[~mask].square().sum() / w_OI.square().sum()).item()
    assert error == pytest.approx(expected, rel=1e-5)


def test_project_low_rank_reaches_the_eckart_young_bound() -> None:
    w_OI = weight(30, 20)
    singular = torch.linalg.svdvals(w_OI.double())
    for rank in (1, 7, 20):
        block = LowRank(20, 30, rank=rank)
        error = initialise(block, Target(w_OI), method_named("project"))
        bound = singular[rank:].square().sum() / singular.square().sum()
        assert error == pytest.approx(float(bound), abs=1e-6)


def test_project_residual_beats_its_own_first_part() -> None:
    """The serial block has no closed form; its descent must use the second part it has."""
    w_OI = weight(24, 36)
    block = GroupedPointwise(36, 24, groups=4, variant="residual")
    error = initialise(block, Target(w_OI), method_named("project"))
    blocks = torch.block_diag(*[torch.ones(6, 9)] * 4).bool()
    masked = float((w_OI * ~blocks).square().sum() / w_OI.square().sum())
    assert error is not None
    assert error < masked - 0.1


def test_project_with_everything_kept_is_exact() -> None:
    w_OI, bias = weight(12, 18), torch.arange(12.0)
    for block in (
        GroupedPointwise(18, 12, groups=1, bias=True),
        LowRank(18, 12, rank=12, bias=True),
    ):
        error = initialise(block, Target(w_OI, bias), method_named("project"))
        assert error == pytest.approx(0, abs=1e-10)
        x = torch.randn(5, 18)
        assert torch.allclose(block(x), torch.nn.functional.linear(x, w_OI, bias), atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GroupedPointwise(512, 768, groups=4),
        lambda: GroupedPointwise(768, 512, groups=4, variant="residual"),
        lambda: LowRank(512, 768, rank=64),
    ],
)
def test_random_has_the_output_variance_of_a_fresh_linear(make) -> None:
    block = make()
    target = Target(weight(block.out_features, block.in_features), seed=5)
    assert initialise(block, target, method_named("random")) is None
    x = torch.randn(2000, block.in_features, generator=torch.Generator().manual_seed(1))
    fresh = torch.nn.Linear(block.in_features, block.out_features, bias=False)
    with torch.no_grad():
        assert block(x).var().item() == pytest.approx(fresh(x).var().item(), rel=0.1)


def test_random_published_is_kaiming_on_a_three_dimensional_weight() -> None:
    """Truth: torch's own Kaiming-uniform on the (G, i, o) tensor the published code makes."""
    block = GroupedPointwise(3072, 9216, groups=12)
    initialise(block, Target(weight(1, 1), seed=1), method_named("random_published"))
    published = torch.empty(12, 256, 768)
    torch.nn.init.kaiming_uniform_(published, a=math.sqrt(5))
    assert block.weight.std().item() == pytest.approx(published.std().item(), rel=0.01)
    assert block.weight.abs().max().item() == pytest.approx(published.abs().max().item(), rel=0.01)


def test_random_published_is_for_grouped_blocks_only() -> None:
    with pytest.raises(RecipeError, match="low_rank"):
        initialise(LowRank(8, 8, rank=2), Target(weight(8, 8)), method_named("random_published"))


def test_seeds() -> None:
    recipe = {"replace": [{"match": "*.mlp.*", "structure": "low_rank", "rank": 4}]}
    models = [tiny_model("llama") for _ in range(3)]
    state = torch.random.get_rng_state()
    for model, seed in zip(models, (0, 0, 1), strict=True):
        llmslim.slim(model, recipe, init="random", seed=seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    a, b, c = (dict(model.named_parameters()) for model in models)
    name = "model.layers.0.mlp.up_proj.down.weight"
    assert torch.equal(a[name], b[name])
    assert not torch.equal(a[name], c[name])
    assert not torch.equal(a[name], a[name.replace("layers.0", "layers.1")])


def test_a_block_has_the_type_and_the_mode_of_what_it_replaces() -> None:
    for training in (True, False):
        model = tiny_model("llama", num_hidden_layers=1).bfloat16().train(training)
        rule = {"match": "*.mlp.*", "structure": "low_rank", "rank": 4}
        llmslim.slim(model, {"replace": [rule]})
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert all(module.training is training for module in model.modules())


def test_a_site_draws_the_same_whatever_else_is_replaced() -> None:
    one, all_ = tiny_model("llama"), tiny_model("llama")
    rule = {"structure": "low_rank", "rank": 4}
    llmslim.slim(one, {"replace": [{"match": "*.3.mlp.up_proj", **rule}]}, init="random")
    llmslim.slim(all_, {"replace": [{"match": "*.mlp.*", **rule}]}, init="random")
    pick = "model.layers.3.mlp.up_proj"
    assert torch.equal(one.get_submodule(pick).up.weight, all_.get_submodule(pick).up.weight)


def test_unknown_methods_are_refused_by_name() -> None:
    assert {"project", "random", "random_published"} <= set(method_names())
    for name in ("projct", "target", "../random", "__init__"):
        with pytest.raises(RecipeError, match=name):
            method_named(name)


@pytest.mark.parametrize("seed", [-1, 1 << 63, 10**30])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    recipe = {"replace": [{"match": "*.up_proj", "structure": "low_rank", "rank": 4}]}
    drawn = []
    for each in (seed, seed, seed + 1):
        model = tiny_model("llama")
        llmslim.slim(model, recipe, init="random", seed=each)
        drawn.append(model.state_dict()["model.layers.0.mlp.up_proj.up.weight"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("own", [None, "random"])
def test_a_method_that_is_asked_for_takes_the_place_of_the_recipes_and_the_rules(own):
    rule = {"match": "*.mlp.*", "structure": "low_rank", "rank": 4, "init": own}
    model, recipe = tiny_model("llama", num_hidden_layers=1), {"init": "random", "replace": [rule]}
    made = llmslim.plan(model, recipe, init="project")
    assert {site.init for site in made.sites} == {"project"}
    made = llmslim.plan(model, recipe)
    assert {site.init for site in made.sites} == {"random"}
