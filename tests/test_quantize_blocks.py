"""Weights of blocks in 8 and 4 bit: their values, what models compute, and what is refused."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from every_architecture import config_classes
from every_architecture import tiny_model as tiny_mixture
from tiny import logits, tiny_model, tokens
from torch import Tensor, nn

import llmslim
from llmslim import fitting, planning
from llmslim.editing.quantised import QuantizedWeight, outside_linears
from llmslim.errors import CheckpointError, SizeError, SlimError, TargetError
from llmslim.modeling.structured import build
from llmslim.recipe import Recipe

RULES = {
    "*.0.mlp.*": {"structure": "grouped_pointwise", "groups": 4, "channel_order": "learned"},
    "*.1.mlp.*": {"structure": "grouped_pointwise", "groups": 4, "variant": "residual"},
    "*.2.mlp.*": {"structure": "grouped_low_rank", "groups": 4, "rank": 3},
    "*.3.mlp.*": {"structure": "block_shuffle", "blocks": 4, "inner_features": 16},
}


def slim_model(rules: dict[str, Any] = RULES) -> Any:
    model = tiny_model("llama")
    replace = [{"match": match, **rule} for match, rule in rules.items()]
    llmslim.slim(model, {"name": "mixed", "init": "random", "replace": replace})
    return model.eval()


def by_hand(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A weight in blocks of 32, and how far off each value may be: half a step, one at the end."""
    codes = 2**bits
    values, bounds = torch.empty_like(weight), torch.empty_like(weight)
    for each, out, bound in zip(weight, values, bounds, strict=True):
        for start in range(0, each.numel(), 32):
            block = each.flatten()[start : start + 32]
            step = (block[block.abs().argmax()] / (-codes / 2)).bfloat16().float()
            grid = torch.arange(-codes // 2, codes // 2) * step
            out.view(-1)[start : start + 32] = grid[(block[:, None] - grid).abs().argmin(1)]
            ends = (block / step) > codes / 2 - 0.5  # beyond the highest code
            late = 0.5 + codes / 2 * 2**-8  # the scale is rounded, too
            bound.view(-1)[start : start + 32] = step.abs() * (0.5 + late * ends)
    return values, bounds


def dequantised(model: Any) -> Any:
    """The same model with ordinary weights of the same values."""
    plain = copy.deepcopy(model)
    for module, name, weight in list(outside_linears(plain)):
        assert isinstance(weight, QuantizedWeight)
        setattr(module, name, nn.Parameter(weight.dequantize()))
    return plain


# -- The tensor.


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 3, 5, 7), (4, 16, 16)])
def test_every_value_is_the_nearest_step(bits: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * 0.05
    values, bounds = by_hand(weight, bits)
    found = QuantizedWeight.of(weight, bits).dequantize()
    assert torch.equal(found, values)
    assert bool(((found - weight).abs() <= bounds * 1.001).all())
    assert bool((found != weight).any())


def test_a_block_of_zeros_stays_one() -> None:
    weight = torch.zeros(2, 8, 8)
    weight[1] = 1.0
    for bits in (8, 4):
        torch.testing.assert_close(
            QuantizedWeight.of(weight, bits).dequantize(), weight, rtol=2**-8, atol=0
        )


@pytest.mark.parametrize(("bits", "share"), [(8, 8.5 / 32), (4, 4.5 / 32)])
def test_the_codes_are_all_there_is_in_memory(bits: int, share: float) -> None:
    weight = torch.randn(4, 24, 32)
    made = QuantizedWeight.of(weight, bits)
    parts = [getattr(made, name) for name in made.__tensor_flatten__()[0]]
    assert sum(part.nbytes for part in parts) == weight.nbytes * share
    with pytest.raises(RuntimeError):
        made.untyped_storage().data_ptr()


def test_a_matrix_alone_is_padded_once() -> None:
    made = QuantizedWeight.of(torch.randn(64, 3), 8)
    assert made.codes.numel() == 64 * 3


@pytest.mark.parametrize("bits", [8, 4])
def test_of_a_stack_only_what_is_taken_is_dequantised(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = QuantizedWeight.of(torch.randn(5, 3, 8, 6), bits)
    whole, rows = made.dequantize(), torch.tensor([4, 0, 4])
    halved = made.bfloat16()
    monkeypatch.setattr(QuantizedWeight, "dequantize", lambda _: pytest.fail("all of it"))
    for index in (3, -1, rows):
        assert torch.equal(made[index], whole[index])
    assert halved[2].dtype == torch.bfloat16


def test_other_indices_are_as_of_any_tensor() -> None:
    made = QuantizedWeight.of(torch.randn(5, 8, 6), 8)
    whole, rows = made.dequantize(), torch.tensor([1, 0])
    for index in ((rows, rows), (slice(None), 2), slice(1, 3), (..., 0)):
        assert torch.equal(made[index], whole[index])
    flat = QuantizedWeight.of(torch.randn(4, 40), 8)
    assert torch.equal(flat[2], flat.dequantize()[2])


def test_it_moves_and_changes_type_as_a_parameter_does() -> None:
    block = build({**_GROUPED, "structure": "grouped_pointwise"})
    llmslim.quantize_blocks(block, 4)
    parts = block.weight.codes.clone(), block.weight.scales.clone()
    block.to(torch.bfloat16)
    assert block.weight.dtype == torch.bfloat16
    assert block(torch.ones(2, 48).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(block.weight.codes, parts[0])
    assert torch.equal(block.weight.scales, parts[1])
    assert isinstance(block.weight, nn.Parameter)
    block.to("meta")
    assert {each.device.type for each in (block.weight, block.weight.codes)} == {"meta"}
    assert block.weight.scales.device.type == "meta"


_GROUPED = {"in_features": 48, "out_features": 96, "bias": True, "groups": 4}


# -- Models.


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_computes_with_the_dequantised_weights(bits: int) -> None:
    model = slim_model()
    before = copy.deepcopy(model)
    llmslim.quantize_blocks(model, bits)
    plain = dequantised(model)
    wanted = logits(plain, tokens())
    assert torch.equal(logits(model, tokens()), wanted)
    assert not torch.equal(logits(before, tokens()), wanted)
    quantised = {id(weight) for *_, weight in outside_linears(model)}
    assert len(quantised) == 3 * (1 + 1 + 1 + 2) + 1  # the residual block that narrows has two
    for name, parameter in model.named_parameters():
        old = before.get_parameter(name)
        assert parameter.shape == old.shape
        assert parameter.dtype == old.dtype
        if id(parameter) not in quantised:
            assert type(parameter) is nn.Parameter
            assert torch.equal(parameter, old)


def test_it_generates_in_bfloat16_with_and_without_autocast() -> None:
    model = slim_model()
    llmslim.quantize_blocks(model, 4)
    plain = dequantised(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model, tokens()), logits(plain, tokens()))
    model.to(torch.bfloat16)
    plain = dequantised(model)
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens(), **asked), plain.generate(tokens(), **asked))


def test_gradients_reach_what_is_before_a_block() -> None:
    block = build({**_GROUPED, "structure": "grouped_pointwise"})
    llmslim.quantize_blocks(block, 8)
    x = torch.randn(5, 48, requires_grad=True)
    block(x).sum().backward()
    dense = block.to_dense()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dense.sum(0).expand(5, -1))
    assert block.weight.grad is None


def test_it_is_copied_pickled_and_compiled() -> None:
    model = slim_model()
    llmslim.quantize_blocks(model, 4)
    wanted = logits(model, tokens())
    assert torch.equal(logits(copy.deepcopy(model), tokens()), wanted)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), tokens()), wanted)
    block = model.model.layers[0].mlp.up_proj
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 48)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("structure", ["grouped_pointwise", "low_rank"])
def test_experts_compute_with_the_dequantised_weights(structure: str, kind: str) -> None:
    model = tiny_mixture(config_classes()["mixtral"])
    rule = {"match": "*experts.*", "structure": structure, "keep_ratio": 0.5}
    recipe = Recipe.of({"init": "random", "replace": [rule]})
    fitting.rewrite(model, planning.plan(model, recipe))
    before = sum(weight.numel() for *_, weight in outside_linears(model))
    llmslim.quantize_blocks(model, 4)
    stacks = [weight for *_, weight in outside_linears(model)]
    assert sum(weight.numel() for weight in stacks) == before > 0
    plain = dequantised(model)
    ids = tokens(vocab=model.config.vocab_size)
    for each in (model, plain):
        each.set_experts_implementation(kind)
    torch.testing.assert_close(logits(model, ids), logits(plain, ids))


# -- What is refused.


@pytest.mark.parametrize("bits", [2, 16, "4", None])
def test_other_numbers_of_bits_are_refused(bits: Any) -> None:
    with pytest.raises(SizeError, match=rf"^bits: {bits!r}; allowed 4, 8\.$"):
        llmslim.quantize_blocks(slim_model(), bits)


def test_nothing_to_quantise_is_an_error_that_says_why() -> None:
    with pytest.raises(TargetError, match=r"^LlamaForCausalLM: .* no slim blocks\. Load"):
        llmslim.quantize_blocks(tiny_model("llama"), 4)
    thin = slim_model({"*.mlp.*": {"structure": "low_rank", "rank": 4}})
    with pytest.raises(TargetError, match=r"^SlimLlama.*linear layers\. Let bitsandbytes"):
        llmslim.quantize_blocks(thin, 4)
    model = slim_model()
    llmslim.quantize_blocks(model, 8)
    with pytest.raises(TargetError, match=r"blocks are quantised already\.$"):
        llmslim.quantize_blocks(model, 4)


def test_saving_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = slim_model()
    llmslim.quantize_blocks(model, 4)
    said = r"model\.layers\.0\.mlp\.gate_proj\.weight: quantised in memory.* Save the model before"
    with pytest.raises(ValueError, match=said):
        model.save_pretrained(tmp_path / "folder")
    with pytest.raises(CheckpointError, match=f"^slim: not written. {said}"):
        llmslim.save(model, tmp_path / "slim")
    assert list(tmp_path.iterdir()) == []


def test_quantised_weights_are_read_only() -> None:
    model = slim_model()
    state = model.state_dict()
    llmslim.quantize_blocks(model, 4)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert not weight.requires_grad
    for change in (
        lambda: weight.data.mul_(2),
        lambda: torch._foreach_mul_([weight.data], 2.0),
    ):
        with pytest.raises(SlimError, match="quantised weights cannot be changed"):
            change()
    with pytest.raises(RuntimeError, match="quantised weights cannot be changed"):
        model.load_state_dict(state)
