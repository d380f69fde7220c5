"""Every structure against the formula it stands for, written out group by group."""

from __future__ import annotations

import json
import re
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from torch import Tensor, nn

from llmslim import slim
from llmslim.modeling import grouped_pointwise
from llmslim.modeling.block_shuffle import BlockShuffle
from llmslim.modeling.factored import FactoredEmbedding, FactoredHead
from llmslim.modeling.grouped_low_rank import GroupedLowRank
from llmslim.modeling.grouped_pointwise import GroupedPointwise
from llmslim.modeling.low_rank import LowRank
from llmslim.modeling.pivoted_low_rank import PivotedLowRank
from llmslim.modeling.structured import StructuredLinear, build, structure_class, take_channels

torch.set_num_threads(1)  # on a busy machine tiny products wait for the second thread, not for work
tried = settings(deadline=None, max_examples=60, derandomize=True)

SPECS: dict[str, dict[str, Any]] = {
    "io": {"structure": "grouped_pointwise", "groups": 4, "variant": "io"},
    "io of one group": {"structure": "grouped_pointwise", "groups": 1, "variant": "io"},
    "residual": {"structure": "grouped_pointwise", "groups": 4, "variant": "residual"},
    "residual of one group": {"structure": "grouped_pointwise", "groups": 1, "variant": "residual"},
    "learned order": {
        "structure": "grouped_pointwise",
        "groups": 4,
        "channel_order": "learned",
    },
    "low_rank": {"structure": "low_rank", "rank": 3},
    "pivoted_low_rank": {"structure": "pivoted_low_rank", "rank": 3},
    "block_shuffle": {"structure": "block_shuffle", "blocks": 4, "inner_features": 20},
    "grouped_low_rank": {"structure": "grouped_low_rank", "groups": 4, "rank": 3},
}
# Fewer outputs, as many, more: `residual` has its second part in the first two.
SIZES = [(24, 8), (16, 16), (8, 24)]

every_block = pytest.mark.parametrize("kind", SPECS)
every_size = pytest.mark.parametrize(("inputs", "outputs"), SIZES)


def make(kind: str, inputs: int, outputs: int, *, bias: bool = True, seed: int = 0, **where: Any):
    torch.manual_seed(seed)
    spec = {**SPECS[kind], "in_features": inputs, "out_features": outputs, "bias": bias}
    block = build(spec, **{"dtype": torch.float64, **where})
    assert isinstance(block, StructuredLinear)
    if block.bias is not None and not block.bias.is_meta:
        nn.init.normal_(block.bias)
    for name, buffer in block.named_buffers():
        assert name in block.buffer_names
        if not buffer.is_meta:
            buffer.copy_(shuffled(block, buffer))
    return block


def shuffled(block: StructuredLinear, order: Tensor) -> Tensor:
    """Other indices for an index buffer: a permutation, or channels for each group."""
    if order.dim() == 1:
        return torch.randperm(len(order))
    return torch.randint(block.in_features, order.shape)


# The formulas, independent of the modules' own code.


def interleave(h: Tensor, groups: int) -> Tensor:
    return torch.cat([h[..., g::groups] for g in range(groups)], dim=-1)


def grouped(x: Tensor, weight: Tensor) -> Tensor:
    """Each group of channels times its own matrix, one after the other."""
    i = weight.shape[1]
    parts = [x[..., g * i : (g + 1) * i] @ weight[g] for g in range(len(weight))]
    return torch.cat(parts, dim=-1)


def formula(block: StructuredLinear, x: Tensor) -> Tensor:
    if isinstance(block, LowRank):
        down_RI, up_OR = block.down.weight, block.up.weight
        matrix = sum(torch.outer(down_RI[r], up_OR[:, r]) for r in range(block.rank))
        y = torch.einsum("...i,io->...o", x, matrix)
    elif isinstance(block, PivotedLowRank):
        y = x.new_zeros(*x.shape[:-1], block.out_features)
        for output, place in enumerate(block.order.tolist()):
            if place < block.rank:
                column = block.pivot.weight[place]
            else:
                column = block.rest.weight[place - block.rank] @ block.pivot.weight
            y[..., output] = (x * column).sum(-1)
    elif isinstance(block, BlockShuffle):
        z = grouped(x, block.first)
        y = grouped(interleave(z, block.first.shape[2]), block.second)
    elif isinstance(block, GroupedLowRank):
        y = formula(block.grouped, x) + formula(block.low_rank, x)
    else:
        assert isinstance(block, GroupedPointwise)
        G, i = block.groups, block.in_features // block.groups
        if block.order is not None:
            seen = [torch.stack([x[..., c] for c in group], -1) for group in block.order.tolist()]
            y = torch.cat([part @ block.weight[g] for g, part in enumerate(seen)], dim=-1)
        elif block.variant == "io" and G > 1:
            W1, W2 = block.weight[:, :i], block.weight[:, i:]
            outputs = [
                torch.einsum("...i,io->...o", x[..., g * i : (g + 1) * i], W1[g])
                + torch.einsum("...i,io->...o", x[..., g::G], W2[g])
                for g in range(G)
            ]
            y = torch.cat(outputs, dim=-1)
        else:
            y = grouped(x, block.weight)
            if block.variant == "residual":
                h = block.act(y)
                y = interleave(h, G)
                if block.second is not None:
                    y = block.act(grouped(y, block.second)) + h
    return y if block.bias is None else y + block.bias


@st.composite
def blocks_and_inputs(draw: st.DrawFn) -> tuple[StructuredLinear, Tensor]:
    groups = draw(st.integers(1, 6))
    inputs = groups * draw(st.integers(1, 6))
    outputs = groups * draw(st.integers(1, 6))
    options: dict[str, Any] = draw(
        st.sampled_from(
            [
                {"structure": "grouped_pointwise", "groups": groups, "variant": "io"},
                {"structure": "grouped_pointwise", "groups": groups, "variant": "residual"},
                {
                    "structure": "grouped_pointwise",
                    "groups": groups,
                    "variant": "residual",
                    "activation": "gelu",
                },
                {"structure": "grouped_pointwise", "groups": groups, "channel_order": "learned"},
                {"structure": "low_rank", "rank": min(groups, inputs, outputs)},
                {"structure": "pivoted_low_rank", "rank": min(groups, inputs, outputs)},
                {"structure": "grouped_low_rank", "groups": groups, "rank": 1},
                {
                    "structure": "block_shuffle",
                    "blocks": groups,
                    "inner_features": groups * draw(st.integers(1, min(inputs, outputs))),
                },
            ]
        )
    )
    sizes = {"in_features": inputs, "out_features": outputs, "bias": draw(st.booleans())}
    torch.manual_seed(draw(st.integers(0, 9)))
    block = build({**options, **sizes}, dtype=torch.float64)
    assert isinstance(block, StructuredLinear)
    for buffer in block.buffers():
        buffer.copy_(shuffled(block, buffer))
    rows = draw(st.sampled_from([(), (0,), (1,), (5,), (2, 3), (2, 1, 4), (113,), (5, 31)]))
    return block, torch.randn(*rows, inputs, dtype=torch.float64)


@settings(tried, max_examples=200)  # eight kinds of blocks, three sizes of pieces
@given(blocks_and_inputs(), st.sampled_from([0, 2_000, 2**22]))
def test_output_is_the_formulas(case, gathered_at_once):
    block, x = case
    with torch.no_grad():
        with mock.patch.object(grouped_pointwise, "_GATHER_BYTES", gathered_at_once):
            y = block(x)
        expected = formula(block, x)
    assert y.shape == (*x.shape[:-1], block.out_features)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@every_block
@every_size
def test_equals_its_dense_matrix_in_a_linear(kind, inputs, outputs):
    block = make(kind, inputs, outputs)
    linear = nn.Linear(inputs, outputs, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(block.to_dense())
        linear.bias.copy_(block.bias)
    for rows in (3, 512, 2000):
        x = torch.randn(rows, inputs, dtype=torch.float64)
        torch.testing.assert_close(block(x), linear(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_channels_are_taken_as_they_are(dtype):
    x, order = torch.randn(2, 3, 5).to(dtype), torch.tensor([4, 0, 0, 2, 1, 3, 4])
    assert torch.equal(take_channels(x, order), torch.stack([x[..., c] for c in order], -1))


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_io_is_zero_outside_its_mask_and_nowhere_inside(groups):
    inputs, outputs = 12, 24
    dense = GroupedPointwise(inputs, outputs, groups=groups).to_dense()
    for row in range(outputs):
        g = row // (outputs // groups)
        for channel in range(inputs):
            seen = channel // (inputs // groups) == g or channel % groups == g
            assert (dense[row, channel] != 0) == seen


def test_residual_of_more_outputs_is_a_shuffled_grouped_map():
    # The vision papers' layer interleaves what it hands on, also where nothing follows.
    block = GroupedPointwise(4, 8, groups=2, variant="residual")
    with torch.no_grad():
        block.weight.copy_(torch.ones(2, 2, 4) * torch.tensor([1.0, 10.0]).reshape(2, 1, 1))
    assert block(torch.ones(4)).tolist() == [2, 2, 20, 20, 2, 2, 20, 20]


@pytest.mark.parametrize("variant", ["io", "residual"])
@every_size
def test_one_group_is_a_dense_layer(variant, inputs, outputs):
    block = GroupedPointwise(inputs, outputs, groups=1, variant=variant, bias=True)
    assert sum(p.numel() for p in block.parameters()) == inputs * outputs + outputs
    linear = nn.Linear(inputs, outputs)
    with torch.no_grad():
        block.weight[0].copy_(linear.weight.t())
        block.bias.copy_(linear.bias)
    x = torch.randn(5, inputs)
    torch.testing.assert_close(block(x), linear(x))
    assert torch.equal(block.to_dense(), linear.weight)


@every_block
@every_size
def test_gradients(kind, inputs, outputs):
    block = make(kind, inputs, outputs)
    x = torch.randn(2, inputs, dtype=torch.float64, requires_grad=True)
    parameters = tuple(block.parameters())

    def run(x, *_):
        return block(x)

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


def test_gradients_pass_a_frozen_block_that_takes_its_rows_in_pieces():
    block = make("io", 24, 8).requires_grad_(False)
    x = torch.randn(100, 24, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(100, 8, dtype=torch.float64)
    with mock.patch.object(grouped_pointwise, "_GATHER_BYTES", 2_000):
        (found,) = torch.autograd.grad(block(x), x, upstream)
    torch.testing.assert_close(found, upstream @ block.to_dense(), rtol=1e-12, atol=1e-12)


def test_gradients_through_an_activation():
    torch.manual_seed(0)
    block = GroupedPointwise(
        12, 6, groups=3, variant="residual", activation="silu", dtype=torch.float64
    )
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    parameters = tuple(block.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: block(x), (x, *parameters))


def test_a_block_with_an_activation_has_no_dense_matrix():
    block = GroupedPointwise(12, 6, groups=3, variant="residual", activation="silu")
    with pytest.raises(ValueError, match="'silu'"):
        block.to_dense()


# Counts, and what is stored.


@tried
@given(blocks_and_inputs())
def test_counted_weights_are_the_parameters(case):
    block, _ = case
    held = sum(p.numel() for name, p in block.named_parameters() if name != "bias")
    sizes = (block.in_features, block.out_features)
    assert type(block).count_weights(*sizes, block.options) == held


def test_a_fixed_order_leaves_no_trace():
    block = GroupedPointwise(12, 8, groups=2)
    assert list(block.state_dict()) == ["weight"]
    assert "channel_order" not in block.spec()
    learned = GroupedPointwise(12, 8, groups=2, channel_order="learned")
    assert list(learned.state_dict()) == ["weight", "order"]
    assert learned.spec()["channel_order"] == "learned"
    learned.load_state_dict(block.state_dict(), strict=False)
    x = torch.randn(3, 12)
    assert torch.equal(learned(x), block(x))  # until it is learned, the order is the channels' own


# Life as a module.


@pytest.mark.parametrize("kind", list(SPECS))
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 128), (256, 256), (128, 512)])
def test_fresh_blocks_have_a_fresh_linears_output_variance(kind, inputs, outputs):
    # One third, whatever the size: averaged over draws, inputs and outputs.
    x = torch.randn(256, inputs, generator=torch.Generator().manual_seed(100))  # no block's seed
    squares = []
    for seed in range(12):
        block = make(kind, inputs, outputs, bias=False, seed=seed, dtype=torch.float32)
        squares.append(block(x).square().mean().item())
    # The mean of 12 draws of the least regular, rank 3, is itself off by 3 % at one sigma.
    assert sum(squares) / len(squares) == pytest.approx(1 / 3, rel=0.08)


@pytest.mark.parametrize("kind", list(SPECS))
def test_compiled_gives_the_same(kind):
    block = make(kind, 24, 8)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for rows in ((3, 24), (2, 5, 24)):
        x = torch.randn(rows, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-12, atol=1e-12)
    torch.compiler.reset()


@every_block
@every_size
@pytest.mark.parametrize("rows", [7, 1030])
def test_bfloat16(kind, inputs, outputs, rows):
    block = make(kind, inputs, outputs).to(torch.bfloat16)
    wide = make(kind, inputs, outputs).to(torch.bfloat16).double()
    x = torch.randn(rows, inputs).bfloat16()
    y = block(x)
    assert y.dtype == torch.bfloat16
    expected = wide(x.double())
    # Eight bits of mantissa, rounded a few times on the way.
    assert (y.double() - expected).abs().max() < 0.03 * expected.abs().max()


@every_block
@every_size
def test_state_dict_round_trip(kind, inputs, outputs):
    block, other = make(kind, inputs, outputs), make(kind, inputs, outputs, seed=1)
    x = torch.randn(3, inputs, dtype=torch.float64)
    assert not torch.equal(other(x), block(x))
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(x), block(x))


@every_block
@every_size
@pytest.mark.parametrize("bias", [True, False])
def test_spec_makes_an_empty_twin(kind, inputs, outputs, bias):
    block = make(kind, inputs, outputs, bias=bias)
    spec = json.loads(json.dumps(block.spec()))
    twin = build(spec, device="meta")
    assert type(twin) is type(block)
    assert twin.spec() == block.spec()
    shapes = {name: p.shape for name, p in block.named_parameters()}
    assert {name: p.shape for name, p in twin.named_parameters()} == shapes
    assert all(p.is_meta for p in twin.parameters())
    assert f"in_features={inputs}, out_features={outputs}, bias={bias}" in repr(block)


@every_block
def test_parameters_are_made_in_the_type_and_place_asked_for(kind):
    block = make(kind, 24, 8, dtype=torch.bfloat16)
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in make(kind, 24, 8, device="meta").parameters()} == {"meta"}


@pytest.mark.parametrize("rows", [10, 2000])
def test_inputs_that_are_not_contiguous(rows):
    for kind in SPECS:
        block = make(kind, 24, 8)
        x = torch.randn(24, rows, dtype=torch.float64).t()
        torch.testing.assert_close(block(x), block(x.contiguous()), rtol=1e-12, atol=1e-12)


# Finding structures by name.


def test_structures_are_found_by_name():
    assert structure_class("grouped_pointwise") is GroupedPointwise
    assert structure_class("low_rank") is LowRank
    assert structure_class("pivoted_low_rank") is PivotedLowRank
    assert structure_class("grouped_low_rank") is GroupedLowRank
    assert structure_class("block_shuffle") is BlockShuffle
    assert structure_class("factored_embedding") is FactoredEmbedding
    assert structure_class("factored_head") is FactoredHead


REFUSED = ["../x", "os", "structured", "sizes", "modeling_llmslim", "", ".", "..structured", "a.b"]
REFUSED += ["Linear", "linear\n", "grouped pointwise", "__init__", "no_such_structure", "a/b"]


@pytest.mark.parametrize("name", REFUSED)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        structure_class(name)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "''"),
        ({"structure": "low_rank", "in_features": 4, "out_features": 4}, "'low_rank': .*rank"),
        (
            {"structure": "low_rank", "in_features": 4, "out_features": 4, "rank": 2, "x": 1},
            "'low_rank': .*x",
        ),
        (
            {"structure": "grouped_pointwise", "in_features": 4, "out_features": 6, "groups": 4},
            "groups 4 ",
        ),
        ({"structure": "factored_head", "out_features": 3, "projection": 5}, "'factored_head'"),
    ],
)
def test_specs_that_build_nothing(spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec)


def test_a_transposed_map_has_a_bias():
    spec = {"structure": "conv1d", "in_features": 3, "out_features": 2}
    assert build(spec)(torch.ones(1, 3)).shape == (1, 2)
    with pytest.raises(ValueError, match="bias"):
        build({**spec, "bias": False})


@pytest.mark.parametrize("name", ["low_rank", "pivoted_low_rank", "grouped_low_rank"])
def test_what_is_inside_a_block_is_not_drawn_by_its_architecture(name):
    """Architectures draw linear layers wherever they find them, some by their names."""
    model = tiny_model("llama")
    rule = {"match": "*.mlp.*", **SPECS[name]}
    slim(model, {"name": "r", "init": "random", "replace": [rule]})
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if ".mlp." in key}
    model.initialize_weights()
    after = model.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
