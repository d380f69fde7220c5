"""Widths that one config field cannot tell, and neurons that look at each other."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tiny import logits, tiny_config, tiny_model, tokens
from torch import nn

import llmslim
from llmslim import TargetError
from llmslim.anatomy.elementwise import has_independent_neurons
from llmslim.anatomy.sites import find_layers, find_mlps
from llmslim.fitting.renumber import free_neurons

_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def _gemma3n(sparsity: list[float]) -> Any:
    return tf.Gemma3nTextConfig(
        **(_SIZES | {"intermediate_size": [96] * 4}),
        head_dim=12,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * 4,
        activation_sparsity_pattern=sparsity,
    )


def _configs() -> dict[str, Any]:
    mamba = {"mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False}
    jamba = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts_per_tok": 1}
    return {
        "llama4": tf.Llama4TextConfig(
            **_SIZES,
            head_dim=12,
            intermediate_size_mlp=96,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
        ),
        "jamba": tf.JambaConfig(**_SIZES, **mamba, **jamba, num_experts=2),
        "openai-gpt": tf.OpenAIGPTConfig(
            n_embd=48, n_layer=4, n_head=4, vocab_size=96, n_positions=64
        ),
        "gemma3n": _gemma3n([0.0] * 4),
        "gemma3n, sparse": _gemma3n([0.95, 0.95, 0.0, 0.0]),
    }


@pytest.mark.parametrize("name", _configs())
def test_more_neurons_change_no_function_and_no_experts(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(_configs()[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(tmp_path / "dense")
    dense = logits(model, tokens())
    recipe = {"name": "w", "width": {"intermediate_size": 240}}
    llmslim.slim(model, recipe)
    wide = logits(model, tokens())
    torch.testing.assert_close(wide, dense, rtol=0, atol=1e-4)
    converted = llmslim.convert(tmp_path / "dense", recipe, tmp_path / "out").path
    torch.testing.assert_close(logits(llmslim.load(converted), tokens()), wide, rtol=0, atol=1e-5)


def test_neurons_of_a_sparse_layer_are_not_free() -> None:
    model = tf.AutoModelForCausalLM.from_config(_gemma3n([0.95, 0.0, 0.5, 0.0]))
    plan = llmslim.plan(model, {"width": {"intermediate_size": 60}})
    assert [mlp.mlp.name for mlp in plan.mlps] == ["model.layers.1.mlp", "model.layers.3.mlp"]


class _Mlp(nn.Module):
    def __init__(self, between: Any) -> None:
        super().__init__()
        self.up, self.down, self.between = nn.Linear(4, 12), nn.Linear(6, 4), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(x).chunk(2, -1)
        y: torch.Tensor = self.down(self.between(gate) * up)
        return y


@pytest.mark.parametrize(
    ("between", "free"),
    [
        (torch.nn.functional.silu, True),
        (lambda x: torch.relu(x).square().clamp(max=6.0), True),
        (nn.Dropout(0.5), True),
        (lambda x: x.softmax(-1), False),
        (lambda x: x - x.mean(-1, keepdim=True), False),
        (lambda x: x * (x > x.topk(2).values[..., -1:]), False),
        (lambda x: x.cumsum(-1), False),
    ],
)
def test_what_lies_between_the_projections_is_watched(between: Any, free: bool) -> None:
    mlp = _Mlp(between)
    weights = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    assert has_independent_neurons(mlp, [mlp.up], mlp.down, mlp.down.weight) is free
    assert all(torch.equal(weights[name], tensor) for name, tensor in mlp.state_dict().items())


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_widths_per_layer_of_transposed_maps(share: float, tmp_path: Path) -> None:
    """A quarter of GPT-2's neurons makes its maps square: nothing tells them from transposed."""
    recipe = {
        "name": "w",
        "replace": [{"match": "*.h.0.mlp.*", "structure": "width", "keep_ratio": share}],
    }
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "dense")
    llmslim.slim(model, recipe)
    model.save_pretrained(tmp_path / "saved")
    converted = llmslim.convert(tmp_path / "dense", recipe, tmp_path / "converted").path
    for folder in (tmp_path / "saved", converted):
        assert torch.equal(logits(llmslim.load(folder), tokens()), logits(model, tokens()))


def test_a_field_that_sizes_something_else_is_not_taken() -> None:
    """Llama's own field does for all of its MLPs, and nothing but them changes."""
    config = tiny_config("llama")
    model = tf.AutoModelForCausalLM.from_config(config)
    plan = llmslim.plan(model, {"width": {"intermediate_size": 60}})
    assert (plan.text_config, plan.resized) == ({"intermediate_size": 60}, {})
    jamba = tf.AutoModelForCausalLM.from_config(_configs()["jamba"])
    plan = llmslim.plan(jamba, {"width": {"intermediate_size": 60}})
    assert plan.text_config == {}
    assert {spec["structure"] for spec in plan.resized.values()} == {"linear"}


@pytest.mark.parametrize(
    ("below", "free"),
    [
        ({"structure": "grouped_pointwise", "groups": 4, "channel_order": "learned"}, True),
        ({"structure": "grouped_pointwise", "groups": 4}, False),
        ({"structure": "low_rank", "rank": 8}, True),
        (None, True),
    ],
)
def test_neurons_move_where_nothing_below_needs_their_order(
    below: dict[str, Any] | None, free: bool
) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    learned = {"structure": "grouped_pointwise", "groups": 4, "channel_order": "learned"}
    rules = [{"match": ["*.gate_proj", "*.up_proj"], **learned}]
    rules += [{"match": "*.down_proj", **below}] if below else []
    sites = {site.name: site for site in llmslim.plan(model, {"replace": rules}).sites}
    group = [site for name, site in sites.items() if not name.endswith("down_proj")]
    (mlp,) = find_mlps(model, find_layers(model))
    assert free_neurons([mlp], group, sites) == (mlp if free else None)


def test_a_config_that_builds_another_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the new width were lost on its way into the config."""
    model, recipe = tiny_model("llama"), {"width": {"intermediate_size": 60}}
    finalise = import_module("llmslim.editing.finalise")
    monkeypatch.setattr(finalise, "set_fields", lambda _model, _fields: None)
    with pytest.raises(TargetError):
        llmslim.plan(model, recipe)
