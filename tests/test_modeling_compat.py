"""What files that travel inside checkpoints use of transformers is there and does its work."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny import MIXTRAL, tiny_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
)
from transformers.distributed import DistributedConfig

from llmslim import compat
from llmslim.modeling import compat as modeling_compat


def test_activations_are_made_by_name():
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(modeling_compat.ACTIVATIONS["silu"](x), nn.functional.silu(x))
    assert "no such" not in modeling_compat.ACTIVATIONS


@pytest.mark.parametrize("marked", [False, True])
def test_a_marked_module_is_not_drawn_again(marked):
    model = tiny_model("llama")
    head = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        head.weight.fill_(3)
    for module in (head, head.weight):
        compat.forget_initialized(module) if not marked else compat.mark_initialized(module)
    model.initialize_weights()
    assert bool((head.weight == 3).all()) is marked


def test_a_mark_of_the_class_stays():
    class Stack(modeling_compat.Initialized, nn.Module): ...

    stack = Stack()
    compat.forget_initialized(stack)
    assert getattr(stack, modeling_compat.INITIALIZED)


def test_an_auto_class_knows_its_classes():
    known = compat.model_mapping(AutoModelForCausalLM)
    assert LlamaConfig in known
    assert known[LlamaConfig] is LlamaForCausalLM
    assert PreTrainedConfig not in known


def test_one_module_of_experts_is_run_in_ways_of_its_own(monkeypatch):
    model = MixtralForCausalLM(MixtralConfig(**MIXTRAL))
    holder = model.model.layers[0].mlp.experts
    holder.config = modeling_compat.ExpertsConfig(model.config, ("batched_mm",))
    called = []
    for name, run in list(modeling_compat.moe.ALL_EXPERTS_FUNCTIONS.items()):
        note = lambda *args, name=name, run=run: called.append(name) or run(*args)  # noqa: E731
        monkeypatch.setitem(modeling_compat.moe.ALL_EXPERTS_FUNCTIONS, name, note)
    found = []
    for way in ("grouped_mm", "batched_mm", "eager"):
        model.set_experts_implementation(way)
        for same in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            found.append(same(torch.arange(6)[None]).logits)
    assert called == ["batched_mm"] * 3
    for one in found:
        torch.testing.assert_close(one, found[0], rtol=1e-4, atol=1e-5)
    assert holder.config.hidden_size == 16
    assert not hasattr(holder.config, "no_such_field")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("inner", "outer"), [(8, 16), (8, 6), (6, 8), (3, 1), (1, 8)])
def test_rows_sorted_by_expert_are_multiplied(inner, outer, dtype, autocast):
    """Sizes that torch's own product takes and those that it refuses, with gradients."""
    torch.manual_seed(0)
    whole = torch.randn(7, 2, inner).to(dtype).transpose(0, 1)
    weights = torch.randn(3, outer, 2, inner).to(dtype).permute(0, 2, 3, 1).requires_grad_()
    ends = torch.tensor([3, 3, 7], dtype=torch.int32)
    for group in (0, 1):  # views, as the groups of a block are
        x = whole[group].detach().requires_grad_()
        weight = weights[:, group]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = modeling_compat.grouped_product(x, weight, ends)
        expected = torch.cat([x[:3] @ weight[0], x[3:] @ weight[2]])
        narrow = autocast and dtype == torch.float32
        assert y.dtype == (torch.bfloat16 if narrow else dtype)
        close = {"rtol": 0.02, "atol": 0.1} if torch.bfloat16 in (dtype, y.dtype) else {}
        torch.testing.assert_close(y.to(dtype), expected, **close)
        slope = torch.randn_like(expected)
        mine = torch.autograd.grad(y, [x, weights], slope.to(y.dtype))
        right = torch.autograd.grad(expected, [x, weights], slope)
        for one, other in zip(mine, right, strict=True):
            torch.testing.assert_close(one, other, **close)


def test_parallel_plans_are_resolved_to_full_names():
    assert modeling_compat._plans_by_name()
    shared = DistributedConfig(tp_size=2)
    plan, *_ = tiny_model("llama")._resolve_parallel_plans(shared)
    assert plan["model.layers.3.mlp.up_proj"] == "colwise"


def test_all_grouped_products_of_transformers_are_known(monkeypatch):
    asked = []

    class Stack:
        dtype, device = torch.float32, torch.device("cpu")

        def data_ptr(self):
            return 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            asked.append(func)
            return args[0]

    x, ends = torch.ones(2, 4), torch.tensor([2], dtype=torch.int32)
    modeling_compat.moe._grouped_mm(x, Stack(), offs=ends)
    monkeypatch.setattr(modeling_compat.moe, "_can_use_grouped_mm", lambda *_: False)
    modeling_compat.moe._grouped_mm(x, Stack(), offs=ends)
    assert len(asked) == 2
    assert set(asked) <= set(modeling_compat.GROUPED_PRODUCTS)


@pytest.mark.parametrize(
    "name",
    [
        *("all_tied_weights_keys", "get_expanded_tied_weights_keys", "is_custom_code"),
        *("is_remote_code", "initialize_weights", "mark_tied_weights_as_initialized"),
        *("named_non_persistent_buffers", "tie_weights", "base_model_prefix"),
        *("maybe_distribute_model", "tp_plan"),
    ],
)
def test_what_has_no_underscore_and_no_documentation_is_there(name):
    assert hasattr(tiny_model("llama"), name)
