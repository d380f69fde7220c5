"""Fits to calibration inputs, against regressions on the inputs themselves and known optima."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmslim
from llmslim import GroupedPointwise, LowRank, RecipeError
from llmslim.init import (
    GramAccumulator,
    Target,
    damping,
    initialise,
    learn_order,
    learn_outputs,
    method_named,
)
from llmslim.init._closed_forms import (
    block_shuffle_factors,
    grouped_low_rank_factors,
    low_rank_factors,
    output_power,
)
from llmslim.modeling.grouped_low_rank import GroupedLowRank
from llmslim.modeling.pivoted_low_rank import PivotedLowRank
from llmslim.modeling.structured import StructuredLinear, build

FITTED = method_named("least_squares")
SPECS: dict[str, dict[str, Any]] = {
    "io": {"structure": "grouped_pointwise", "groups": 4},
    "io, learned order": {
        "structure": "grouped_pointwise",
        "groups": 4,
        "channel_order": "learned",
    },
    "residual": {"structure": "grouped_pointwise", "groups": 4, "variant": "residual"},
    "low_rank": {"structure": "low_rank", "rank": 5},
    "pivoted_low_rank": {"structure": "pivoted_low_rank", "rank": 5},
    "block_shuffle": {"structure": "block_shuffle", "blocks": 2, "inner_features": 10},
    "grouped_low_rank": {"structure": "grouped_low_rank", "groups": 4, "rank": 3},
    "grouped_low_rank, learned order": {
        "structure": "grouped_low_rank",
        "groups": 4,
        "rank": 3,
        "channel_order": "learned",
    },
}
SIZES = [(24, 36), (36, 24)]
every_block = pytest.mark.parametrize("kind", SPECS)
every_size = pytest.mark.parametrize(("inputs", "outputs"), SIZES)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs_like_a_models(tokens: int, channels: int, *, seed: int = 0) -> Tensor:
    """Correlated channels of unlike power, as activations are."""
    power = torch.logspace(-1, 1, channels, dtype=torch.float64)
    mixed = drawn(tokens, channels, seed=seed) @ drawn(channels, channels, seed=seed + 1)
    return mixed * power[torch.randperm(channels, generator=torch.Generator().manual_seed(seed))]


def gram_of(x_TI: Tensor) -> Tensor:
    return x_TI.T @ x_TI / len(x_TI)


def empty(kind: str, inputs: int, outputs: int, dtype: torch.dtype = torch.float64) -> Any:
    """Return a block as surgery makes it: without memory first, so that buffers hold anything."""
    spec = {**SPECS[kind], "in_features": inputs, "out_features": outputs}
    block = build(spec, device="meta", dtype=dtype).to_empty(device="cpu")
    for tensor in (*block.parameters(), *block.buffers()):
        tensor.data.fill_(-7)
    return block


def regression(x_TI: Tensor, y_To: Tensor, w_oI: Tensor, channels: list[int]) -> Tensor:
    """Ridge regression of y on some channels, rows of damping appended, by torch's own solver."""
    root = damping(gram_of(x_TI)).sqrt().diag()
    inputs = torch.cat((x_TI / len(x_TI) ** 0.5, root))
    outputs = torch.cat((y_To / len(x_TI) ** 0.5, root @ w_oI.T))
    return torch.linalg.lstsq(inputs[:, channels], outputs).solution


@every_size
@pytest.mark.parametrize("groups", [2, 3, 4, 12])
def test_io_is_every_groups_own_regression(inputs: int, outputs: int, groups: int) -> None:
    x, w_OI = inputs_like_a_models(200, inputs), drawn(outputs, inputs, seed=5)
    block = GroupedPointwise(inputs, outputs, groups=groups, dtype=torch.float64)
    error = initialise(block, Target(w_OI, gram_II=gram_of(x)), FITTED)
    i, o = inputs // groups, outputs // groups
    dense = torch.zeros_like(w_OI)
    for g in range(groups):
        rows = slice(g * o, (g + 1) * o)
        channels = [c for c in range(inputs) if c // i == g or c % groups == g]
        dense[rows, channels] = regression(x, x @ w_OI[rows].T, w_OI[rows], channels).T
    torch.testing.assert_close(block.to_dense(), dense, rtol=1e-5, atol=1e-5)
    y, z = x @ w_OI.T, block(x).detach()
    assert error == pytest.approx(float((y - z).square().sum() / y.square().sum()), rel=1e-6)
    # A channel that a group sees twice carries half its weight on either side.
    for c in range(inputs):
        if c // i == c % groups:
            g = c // i
            assert torch.equal(block.weight[g, c - g * i], block.weight[g, i + c // groups])


def test_residual_without_a_second_part_is_every_groups_own_regression() -> None:
    inputs, outputs, groups = 24, 36, 4
    x, w_OI = inputs_like_a_models(200, inputs), drawn(outputs, inputs, seed=5)
    block = GroupedPointwise(
        inputs, outputs, groups=groups, variant="residual", dtype=torch.float64
    )
    initialise(block, Target(w_OI, gram_II=gram_of(x)), FITTED)
    i, o = inputs // groups, outputs // groups
    for out in range(outputs):
        # Output n of the interleaved block was made as channel (n mod o) G + n // o.
        g = ((out % o) * groups + out // o) // o
        channels = list(range(g * i, (g + 1) * i))
        row = w_OI[out : out + 1]
        expected = torch.zeros(1, inputs, dtype=torch.float64)
        expected[:, channels] = regression(x, x @ row.T, row, channels).T
        torch.testing.assert_close(block.to_dense()[out : out + 1], expected, rtol=1e-6, atol=1e-6)


def test_residual_uses_its_second_part() -> None:
    x, w_OI = inputs_like_a_models(200, 36), drawn(24, 36, seed=5)
    gram_II, block = gram_of(x), empty("residual", 36, 24)
    error = initialise(block, Target(w_OI, gram_II=gram_II), FITTED)
    first_alone = GroupedPointwise(36, 24, groups=4, variant="residual", dtype=torch.float64)
    with torch.no_grad():
        first_alone.weight.zero_()
        for g in range(4):
            channels, rows = list(range(g * 9, g * 9 + 9)), slice(g * 6, g * 6 + 6)
            first_alone.weight[g] = regression(x, x @ w_OI[rows].T, w_OI[rows], channels)
        first_alone.second.zero_()
        alone = output_power(w_OI - first_alone.to_dense(), gram_II) / output_power(w_OI, gram_II)
    assert error is not None
    assert error < 0.9 * alone


@every_size
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_low_rank_leaves_exactly_the_discarded_singular_values(
    inputs: int, outputs: int, rank: int
) -> None:
    x, w_OI = inputs_like_a_models(300, inputs), drawn(outputs, inputs, seed=5)
    gram_II = gram_of(x)
    damped = gram_II + damping(gram_II).diag()
    singular = torch.linalg.svdvals(w_OI @ torch.linalg.cholesky(damped))
    bound = float(singular[rank:].square().sum() / singular.square().sum())
    for cls in (LowRank, PivotedLowRank):
        block = cls(inputs, outputs, rank=rank, dtype=torch.float64)
        initialise(block, Target(w_OI, gram_II=gram_II), FITTED)
        reached = output_power(w_OI - block.to_dense(), damped) / output_power(w_OI, damped)
        assert reached == pytest.approx(bound, rel=1e-6, abs=1e-9)


@every_size
@pytest.mark.parametrize("method", ["least_squares", "project"])
def test_pivoted_is_the_low_rank_matrix_itself(inputs: int, outputs: int, method: str) -> None:
    x, w_OI = inputs_like_a_models(300, inputs), drawn(outputs, inputs, seed=5)
    target = Target(w_OI, gram_II=gram_of(x))
    plain = LowRank(inputs, outputs, rank=7, dtype=torch.float64)
    pivoted = PivotedLowRank(inputs, outputs, rank=7, dtype=torch.float64)
    initialise(plain, target, method_named(method))
    initialise(pivoted, target, method_named(method))
    torch.testing.assert_close(pivoted.to_dense(), plain.to_dense(), rtol=1e-7, atol=1e-7)
    assert sorted(pivoted.order.tolist()) == list(range(outputs))
    assert sum(p.numel() for p in pivoted.parameters()) == 7 * (inputs + outputs - 7)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_pivots_cost_no_accuracy(dtype: torch.dtype, allowed: float) -> None:
    """Truth: the same matrix in float64; two plain thin factors are as far from it."""
    x, w_OI = inputs_like_a_models(400, 96), drawn(128, 96, seed=5)
    target, errors = Target(w_OI, gram_II=gram_of(x)), {}
    for cls in (LowRank, PivotedLowRank):
        exact = cls(96, 128, rank=40, dtype=torch.float64)
        initialise(exact, target, FITTED)
        rounded = cls(96, 128, rank=40, dtype=dtype)
        rounded.load_state_dict(exact.state_dict())
        y, z = exact(x[:50]).detach(), rounded(x[:50].to(dtype)).detach()
        errors[cls] = float((z.double() - y).norm() / y.norm())
        if cls is PivotedLowRank:
            assert exact.rest.weight.abs().max() < 4
    assert errors[PivotedLowRank] < min(2 * errors[LowRank], allowed)


def test_everything_kept_is_exact() -> None:
    x, w_OI, bias = inputs_like_a_models(300, 24), drawn(36, 24, seed=5), drawn(36, seed=6)
    blocks: list[StructuredLinear] = [
        GroupedPointwise(24, 36, groups=1, bias=True, dtype=torch.float64),
        LowRank(24, 36, rank=24, bias=True, dtype=torch.float64),
        PivotedLowRank(24, 36, rank=24, bias=True, dtype=torch.float64),
        GroupedLowRank(24, 36, groups=4, rank=24, bias=True, dtype=torch.float64),
    ]
    for block in blocks:
        error = initialise(block, Target(w_OI, bias, gram_II=gram_of(x)), FITTED)
        assert error == pytest.approx(0, abs=1e-12)
        torch.testing.assert_close(block(x), x @ w_OI.T + bias, rtol=1e-6, atol=1e-6)


@every_block
@every_size
def test_on_their_own_inputs_fits_beat_projections(kind: str, inputs: int, outputs: int) -> None:
    x, w_OI = inputs_like_a_models(300, inputs), drawn(outputs, inputs, seed=5)
    errors = {}
    for method in ("project", "least_squares"):
        block = empty(kind, inputs, outputs)
        errors[method] = initialise(block, Target(w_OI, gram_II=gram_of(x)), method_named(method))
        y, z = x @ w_OI.T, block(x).detach()
        truth = float((y - z).square().sum() / y.square().sum())
        assert errors[method] == pytest.approx(truth, rel=1e-6)
    assert errors["least_squares"] < 0.95 * errors["project"]


@every_size
@pytest.mark.parametrize("method", ["project", "least_squares"])
def test_a_block_that_is_its_own_target_is_found_again(
    inputs: int, outputs: int, method: str
) -> None:
    x = inputs_like_a_models(300, inputs)
    for kind in ("io", "low_rank", "pivoted_low_rank"):
        spec = {**SPECS[kind], "in_features": inputs, "out_features": outputs}
        torch.manual_seed(3)
        w_OI = build(spec, dtype=torch.float64).to_dense()
        error = initialise(
            empty(kind, inputs, outputs), Target(w_OI, gram_II=gram_of(x)), method_named(method)
        )
        assert error == pytest.approx(0, abs=1e-9)


# Alternations.


@every_size
def test_every_sweep_lowers_the_error(inputs: int, outputs: int) -> None:
    gram_II, w_OI = gram_of(inputs_like_a_models(300, inputs)), drawn(outputs, inputs, seed=5)
    shuffled = block_shuffle_factors(w_OI, gram_II, 2, 8, sweeps=5)[-1]
    grouped = grouped_low_rank_factors(w_OI, gram_II, 4, 3, sweeps=5)[-1]
    for errors in (shuffled, grouped):
        assert len(errors) > 1
        assert all(later <= earlier for earlier, later in pairwise(errors))
        assert errors[-1] < 0.99 * errors[0]
    u_OR, v_RI = low_rank_factors(w_OI, gram_II, 3)
    assert grouped[0] < output_power(w_OI - u_OR @ v_RI, gram_II)


# Orders.


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("groups", [2, 3, 4, 6, 12])
def test_a_learned_order_is_never_worse_than_none(groups: int, seed: int) -> None:
    x, w_OI = inputs_like_a_models(300, 24, seed=seed), drawn(36, 24, seed=seed + 9)
    target, errors = Target(w_OI, gram_II=gram_of(x)), {}
    damped = gram_of(x) + damping(gram_of(x)).diag()
    for channel_order in ("fixed", "learned"):
        block = GroupedPointwise(
            24, 36, groups=groups, channel_order=channel_order, dtype=torch.float64
        )
        initialise(block, target, FITTED)
        errors[channel_order] = output_power(w_OI - block.to_dense(), damped) / output_power(
            w_OI, damped
        )
    assert all(len(set(channels)) == len(channels) for channels in block.order.tolist())
    assert errors["learned"] <= errors["fixed"] * (1 + 1e-6)


def test_a_hidden_order_is_found() -> None:
    """A matrix that is an io block in shuffled channels: the order that unshuffles it fits all."""
    torch.manual_seed(2)
    hidden = GroupedPointwise(48, 48, groups=4, dtype=torch.float64).to_dense()
    shuffle = torch.randperm(48)
    w_OI, gram_II = hidden[:, shuffle], torch.eye(48, dtype=torch.float64)
    own = GroupedPointwise(48, 48, groups=4, dtype=torch.float64)
    assert initialise(own, Target(w_OI, gram_II=gram_II), FITTED) > 0.4
    assert learn_order(w_OI, gram_II, 4)[1] < 1e-6
    block = GroupedPointwise(48, 48, groups=4, channel_order="learned", dtype=torch.float64)
    for method in ("project", "least_squares"):
        assert initialise(block, Target(w_OI, gram_II=gram_II), method_named(method)) < 1e-6


def test_a_channel_that_every_output_needs_is_seen_by_every_group() -> None:
    x, w_OI = drawn(300, 24), drawn(36, 24, seed=5)
    x[:, 7] *= 100
    target, errors = Target(w_OI, gram_II=gram_of(x)), []
    for channel_order in ("fixed", "learned"):
        block = GroupedPointwise(24, 36, groups=6, channel_order=channel_order, dtype=torch.float64)
        errors.append(initialise(block, target, FITTED))
    assert all(7 in channels for channels in block.order.tolist())
    assert errors[0] > 0.5
    assert errors[1] < 0.01


def test_free_outputs_help() -> None:
    torch.manual_seed(2)
    hidden = GroupedPointwise(48, 48, groups=4, dtype=torch.float64).to_dense()
    w_OI, gram_II = hidden[torch.randperm(48)], torch.eye(48, dtype=torch.float64)
    outputs = learn_outputs(w_OI[None], gram_II, 4)
    assert sorted(outputs.tolist()) == list(range(48))
    assert learn_order(w_OI[outputs], gram_II, 4)[1] < 0.5 * learn_order(w_OI, gram_II, 4)[1]


def test_maps_that_share_their_outputs_are_served_together() -> None:
    """Two maps whose rows were shuffled alike: one order of the outputs unshuffles both."""
    torch.manual_seed(3)
    hidden = [GroupedPointwise(48, 48, groups=4, dtype=torch.float64).to_dense() for _ in range(2)]
    shuffle, gram_II = torch.randperm(48), torch.eye(48, dtype=torch.float64)
    both = torch.stack(hidden)[:, shuffle]
    outputs = learn_outputs(both, gram_II, 4)
    for w_OI in both:
        assert learn_order(w_OI[outputs], gram_II, 4)[1] < 0.5 * learn_order(w_OI, gram_II, 4)[1]


# Awkward inputs.


def awkward(kind: str, channels: int) -> Tensor:
    x = inputs_like_a_models(300, channels).float()
    if kind == "rank deficient":
        x[:, 1] = x[:, 0] - x[:, 2]
    elif kind == "a dead channel":
        x[:, 3] = 0
    elif kind == "few tokens":
        x = x[: channels // 3]
    elif kind == "a NaN":
        x[5, 2] = float("nan")
    elif kind == "an enormous activation":
        x[0, 4] = 1e4 * x.abs().max()
    elif kind == "nothing fires":
        x.zero_()
    return x


KINDS = ("rank deficient", "a dead channel", "few tokens", "a NaN", "an enormous activation")


@every_block
@pytest.mark.parametrize("trouble", [*KINDS, "nothing fires"])
def test_awkward_inputs_give_finite_blocks(kind: str, trouble: str) -> None:
    x, w_OI = awkward(trouble, 24), drawn(36, 24, seed=5).float()
    gram = GramAccumulator(24)
    gram.update(x)
    assert gram.skipped == (1 if trouble == "a NaN" else 0)
    block = empty(kind, 24, 36, torch.float32)
    error = initialise(block, Target(w_OI, gram_II=gram.gram_II), FITTED)
    assert all(p.isfinite().all() for p in block.parameters())
    assert error is not None
    assert 0 <= error < 1


@pytest.mark.parametrize("kind", SPECS)
def test_a_zero_weight_gives_a_zero_block(kind: str) -> None:
    block = empty(kind, 24, 24, torch.float32)
    gram_II = gram_of(inputs_like_a_models(100, 24))
    assert initialise(block, Target(torch.zeros(24, 24), gram_II=gram_II), FITTED) == 0
    dense = block.to_dense()
    assert dense.isfinite().all()
    assert dense.abs().max() < 1e-3


def test_io_copies_what_a_dead_channel_had() -> None:
    """Where the tokens say nothing, the block stays near the weight: other text may say more."""
    x, w_OI = inputs_like_a_models(300, 24), drawn(36, 24, seed=5)
    x[:, 0] = 0
    block = GroupedPointwise(24, 36, groups=4, dtype=torch.float64)
    initialise(block, Target(w_OI, gram_II=gram_of(x)), FITTED)
    torch.testing.assert_close(block.to_dense()[:9, 0], w_OI[:9, 0])


def test_without_inputs_it_says_what_to_do() -> None:
    block = LowRank(8, 8, rank=2)
    assert FITTED.needs_gram
    assert not method_named("project").needs_gram
    with pytest.raises(RecipeError, match=r"least_squares.*calibration"):
        initialise(block, Target(torch.eye(8)), FITTED)


# Buffers.


@every_block
@pytest.mark.parametrize("method", ["random", "project", "least_squares"])
def test_every_method_sets_every_buffer(kind: str, method: str) -> None:
    block = empty(kind, 24, 36)
    target = Target(drawn(36, 24), gram_II=gram_of(inputs_like_a_models(100, 24)))
    initialise(block, target, method_named(method))
    for name, buffer in block.named_buffers():
        assert name in block.buffer_names
        assert buffer.dtype == torch.int64
        assert buffer.min() >= 0
        assert buffer.max() < (24 if buffer.dim() == 2 else 36)
        assert len(buffer.unique()) == (36 if buffer.dim() == 1 else 24) or method != "random"
    twin = build(block.spec(), dtype=torch.float64)
    twin.load_state_dict(block.state_dict())
    x = drawn(5, 24)
    assert torch.equal(twin(x), block(x))


@pytest.mark.parametrize(
    "rule",
    [
        {"structure": "pivoted_low_rank", "keep_ratio": 0.5},
        {"structure": "grouped_pointwise", "groups": 4, "channel_order": "learned"},
        {"structure": "grouped_low_rank", "groups": 8, "rank": 3, "channel_order": "learned"},
        {"structure": "block_shuffle", "keep_ratio": 0.5},
    ],
)
def test_checkpoints_keep_index_buffers(rule: dict[str, Any], tmp_path) -> None:
    model = tiny_model("llama")
    llmslim.slim(model, {"replace": [{"match": "*.mlp.*", **rule}]}, init="project")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    buffers = dict(model.named_buffers())
    kept = [name for name in buffers if name.endswith(".order")]
    assert (len(kept) > 0) == (rule["structure"] != "block_shuffle")
    for name in kept:
        assert torch.equal(half.get_buffer(name), buffers[name])


def test_a_checkpoint_brings_the_files_of_a_structures_parts(tmp_path) -> None:
    model = tiny_model("llama")
    rule = {"structure": "grouped_low_rank", "groups": 8, "rank": 3}
    llmslim.slim(model, {"replace": [{"match": "*.mlp.*", **rule}]}, init="random")
    model.save_pretrained(tmp_path)
    files = {path.stem for path in tmp_path.glob("*.py")}
    assert {"grouped_low_rank", "grouped_pointwise", "low_rank"} <= files


@pytest.mark.parametrize("outputs", [12, 36])
def test_both_factors_of_a_low_rank_are_of_one_scale(outputs: int) -> None:
    """Of each rank-one part: an optimiser's step then means the same to either factor."""
    x, w_OI = inputs_like_a_models(300, 24), drawn(outputs, 24, seed=5)
    block = LowRank(24, outputs, rank=7, dtype=torch.float64)
    for method in ("least_squares", "project"):
        initialise(block, Target(w_OI, gram_II=gram_of(x)), method_named(method))
        torch.testing.assert_close(block.down.weight.norm(dim=1), block.up.weight.norm(dim=0))
