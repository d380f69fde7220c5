"""Tensor parallelism: slim models that two processes share give the logits of one.

The truth is the dense model of the same matrices, which is run in this process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as tf
from tiny import logits, tiny_model, tokens
from torch import nn
from transformers.distributed import DistributedConfig

import llmslim
from llmslim.modeling import compat, modeling_llmslim
from llmslim.modeling.experts import Experts
from llmslim.modeling.modeling_llmslim import (
    become_slim,
    replace_sites,
    shard_in_vllm,
    sharded_plan,
)
from llmslim.modeling.structured import StructuredLinear, build
from llmslim.storage.write import write_checkpoint

LOW: dict[str, Any] = {"structure": "low_rank", "init": "project", "keep_ratio": 0.5}
PIVOTED: dict[str, Any] = LOW | {"structure": "pivoted_low_rank"}
GROUPED: dict[str, Any] = {"structure": "grouped_pointwise", "init": "project", "groups": 4}
PROGRAM = """
import os, pathlib, sys
import torch
from torch import distributed, multiprocessing
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import llmslim

def load(rank, ids, folders):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}  # as torchrun does
    for folder in map(pathlib.Path, folders):
        shared = DistributedConfig(tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=shared)
        model(ids, labels=ids, use_cache=False).loss.backward()
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
        weights = dict(model.named_parameters())
        local = {n: w.to_local() if isinstance(w, DTensor) else w for n, w in weights.items()}
        held = {name: weight.numel() for name, weight in local.items()}
        slope = weights["model.layers.0.input_layernorm.weight"].grad
        torch.save({"logits": logits, "held": held, "slope": slope}, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()

# Forked, so that all is imported once.
given = (torch.load(sys.argv[1]), sys.argv[2:])
multiprocessing.start_processes(load, given, nprocs=2, start_method="fork")
"""


def experts() -> Any:
    sizes = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "head_dim": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    few = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    torch.manual_seed(0)
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**sizes, **heads, **few)).eval()


def with_head(model: Any) -> Any:
    """Put a low-rank head, and a factored embedding, in a model."""
    sizes = {"in_features": 48, "out_features": 96, "bias": False}
    head = {"structure": "low_rank", "rank": 7, **sizes}
    wide = {"structure": "grouped_pointwise", "groups": 4, "in_features": 16, "out_features": 48}
    table = {"structure": "factored_embedding", "num_embeddings": 96, "embedding_dim": 16}
    sites = {"lm_head": head, "model.embed_tokens": table | {"projection": wide}}
    replace_sites(model, sites)
    become_slim(model, sites)
    return model


def slim(model: Any, *rules: dict[str, Any]) -> Any:
    llmslim.slim(model, {"name": "x", "replace": list(rules)})
    return model


MODELS: dict[str, Any] = {
    # Its projections of queries, keys and values have biases.
    "low rank": lambda: slim(tiny_model("qwen2"), {"role": ["mlp", "attention"], **LOW}),
    "beside dense": lambda: slim(
        tiny_model("qwen3"),
        {"match": "*.0.mlp.down_proj", **GROUPED},
        {"match": "*.0.self_attn.q_proj", **LOW},
        {"match": "*.1.mlp.up_proj", **LOW},
        {"match": "*.1.self_attn.k_proj", **GROUPED},
        {"match": "*.2.mlp.down_proj", **PIVOTED},
        {"match": "*.2.self_attn.o_proj", **PIVOTED},
        {"match": "*.3.mlp.gate_proj", **PIVOTED},
    ),
    "widths": lambda: slim(
        tiny_model("llama"),
        {"match": "*.1.mlp.*", "structure": "width", "init": "project", "keep_ratio": 0.5},
        {"match": "*.2.mlp.*", "structure": "width", "init": "project", "keep_ratio": 0.344},
    ),
    "one key head": lambda: slim(
        tiny_model("llama", num_key_value_heads=1), {"role": "attention", **LOW}
    ),
    "experts": lambda: slim(experts(), {"match": "*.1.*", "role": "experts", **LOW}),
    "vocabulary": lambda: with_head(tiny_model("llama")),
}
HALVED = {
    "low rank": [
        *("0.mlp.up_proj.up.weight", "0.mlp.gate_proj.up.weight", "0.mlp.down_proj.down.weight"),
        *("0.self_attn.k_proj.up.weight", "0.self_attn.k_proj.bias"),
        "0.self_attn.o_proj.down.weight",
    ],
    "beside dense": [
        *("0.self_attn.q_proj.up.weight", "0.self_attn.v_proj.weight"),
        *("1.mlp.up_proj.up.weight", "1.mlp.gate_proj.weight", "1.mlp.down_proj.weight"),
        *("2.mlp.down_proj.pivot.weight", "2.mlp.up_proj.weight"),
    ],
    "widths": ["0.mlp.up_proj.weight", "1.mlp.up_proj.weight"],
    "experts": ["0.mlp.experts.down_proj"],
}
WHOLE = {
    "low rank": ["0.mlp.up_proj.down.weight", "0.mlp.down_proj.up.weight"],
    "beside dense": [
        *("0.mlp.down_proj.weight", "0.mlp.up_proj.weight", "0.mlp.gate_proj.weight"),
        *("1.self_attn.q_proj.weight", "1.self_attn.o_proj.weight"),
        *("2.mlp.down_proj.rest.weight", "3.mlp.up_proj.weight", "3.mlp.down_proj.weight"),
    ],
    "widths": ["2.mlp.up_proj.weight", "2.mlp.down_proj.weight"],
    "one key head": ["0.self_attn.k_proj.up.weight", "0.self_attn.q_proj.up.weight"],
    "experts": ["1.mlp.experts.down_proj.up.weight", "1.mlp.experts.down_proj.down.weight"],
}


def dense_twin(model: Any) -> Any:
    """Put the dense matrix of each block in its place, in place."""
    for name, block in list(model.named_modules()):
        holder, _, leaf = name.rpartition(".")
        if isinstance(block, Experts):
            delattr(model.get_submodule(holder), leaf)
            setattr(model.get_submodule(holder), leaf, nn.Parameter(block.to_dense()))
        elif isinstance(block, StructuredLinear):
            linear = nn.Linear(block.in_features, block.out_features, bias=block.bias is not None)
            linear.weight = nn.Parameter(block.to_dense())
            linear.bias = block.bias
            setattr(model.get_submodule(holder), leaf, linear)
    return model


def run_in_two_processes(folders: list[Path], home: Path) -> None:
    torch.save(tokens(), home / "ids.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(home / "ids.pt"), *map(str, folders)],
        env=os.environ | shared | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_give_the_logits_of_the_dense_matrices(tmp_path: Path) -> None:
    models = {name: make() for name, make in MODELS.items()}
    folders = {name: tmp_path / name.replace(" ", "_") for name in models}
    for name, model in models.items():
        write_checkpoint(model, folders[name])
    run_in_two_processes(list(folders.values()), tmp_path)
    for name, model in models.items():
        sizes = {key: weight.numel() for key, weight in model.named_parameters()}
        dense = dense_twin(model)
        right = logits(dense, tokens())
        dense(tokens(), labels=tokens(), use_cache=False).loss.backward()
        slope = dense.model.layers[0].input_layernorm.weight.grad
        for rank in (0, 1):
            found = torch.load(folders[name] / f"rank{rank}.pt")
            torch.testing.assert_close(found["logits"], right, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(found["slope"], slope, atol=2e-5, rtol=1e-4)
            for part, share in ((HALVED, 2), (WHOLE, 1)):
                for weight in part.get(name, ()):
                    key = f"model.layers.{weight}"
                    assert found["held"][key] * share == sizes[key], (name, key)


def holding(name: str, spec: dict[str, Any]) -> nn.Module:
    """Return modules inside modules, with a block of that name."""
    module = build(spec)
    for part in reversed(name.split(".")):
        holder = nn.Module()
        holder.add_module(part, module)
        module = holder
    return module


SIZES = {"in_features": 8, "out_features": 8, "bias": False}
BLOCK = {"structure": "grouped_pointwise", "groups": 4, **SIZES}


@pytest.mark.parametrize(
    ("name", "style", "whole"),
    [
        ("layers.3.mlp.up_proj", "colwise", "layers.3.mlp"),
        ("layers.3.fc1", "colwise", "layers.3"),
        ("layers.3.attention.q_proj.linear", "colwise", "layers.3.attention"),
        ("encoder.fc2", "rowwise", "encoder"),
        ("layers.3.mlp.experts.gate_up_proj", "packed_colwise", "layers.3.mlp.experts"),
        ("layers.3.self_attn.q_proj", "colwise_gather_output", "layers.3.self_attn.q_proj"),
        ("layers.3.self_attn.o_proj", "rowwise_split_input", "layers.3.self_attn.o_proj"),
    ],
)
def test_a_block_that_cannot_be_sharded_is_whole_with_what_it_meets(
    name: str, style: str, whole: str
) -> None:
    beside = {f"{whole}.another": "rowwise", f"{whole}_2.another": "colwise"}
    around = {"layers.3.mlp.experts": "moe_tp_experts"} if "experts" in name else {}
    plan = {name: style, f"{name}.weight": style, **beside, **around}
    left = {f"{whole}_2.another": "colwise"}
    assert sharded_plan(holding(name, BLOCK), plan, 2) == (left, {whole})


def test_a_style_that_shards_nothing_is_a_blocks_too() -> None:
    plan = {"layers.3.attention.kv": "mla_kv_a_proj"}
    assert sharded_plan(holding("layers.3.attention.kv", BLOCK), plan, 2) == (plan, set())


@pytest.mark.parametrize(("devices", "fits"), [(2, True), (4, False)])
def test_packed_outputs_have_two_halves_to_share(devices: int, fits: bool) -> None:
    name = "layers.0.mlp.gate_up"
    block = {"structure": "low_rank", "rank": 3, **SIZES, "out_features": 12}
    made, whole = sharded_plan(holding(name, block), {name: "packed_colwise"}, devices)
    style = "packed_colwise"
    assert made == ({f"{name}.up.weight": style, f"{name}.up": style} if fits else {})
    assert whole == (set() if fits else {"layers.0.mlp"})


def test_a_transformers_without_such_plans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_plans_by_name", lambda: False)
    model = slim(tiny_model("llama"), {"role": "mlp", **LOW})
    with pytest.raises(ValueError, match=r"shards no slim model .* 5\.23 or newer"):
        model.maybe_distribute_model(model, DistributedConfig(tp_size=2), object())
    assert model.maybe_distribute_model(model, None, None) is model


# -- vLLM, which shards by a plan of its own kind. What it does with it: tests/test_vllm.py.


def test_vllm_is_given_a_plan_of_full_names() -> None:
    model = slim(
        tiny_model("llama"),
        {"match": "*.0.self_attn.*", **LOW},
        {"match": "*.0.mlp.*", **LOW},
        {"match": "*.1.mlp.down_proj", **GROUPED},
    )
    right = logits(model, tokens())
    shard_in_vllm(model, 2)
    layer, style = "model.layers.0.mlp", model.tp_plan
    # The first name counts that a projection's begins with: none may be that of a block.
    assert [name for name in style if name.startswith(layer)] == [
        *(f"{layer}.gate_proj.up.weight", f"{layer}.gate_proj.up"),
        *(f"{layer}.up_proj.up.weight", f"{layer}.up_proj.up"),
        *(f"{layer}.down_proj.down.weight", f"{layer}.down_proj.down"),
    ]
    assert style["model.layers.0.self_attn.o_proj.down"] == "rowwise"
    assert style["model.layers.1.self_attn.q_proj"] == "colwise"
    assert not [name for name in style if name.startswith("model.layers.1.mlp")]
    # It joins and shards what is an `nn.Linear`, whatever the plan says.
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert "model.layers.0.mlp.up_proj.up" in linear
    assert "model.layers.2.mlp.up_proj" in linear
    assert not [name for name in linear if name.startswith("model.layers.1.mlp")]
    assert torch.equal(logits(model, tokens()), right)


@pytest.mark.parametrize(
    ("architecture", "rule"),
    [
        ("llama", {"match": "*.1.self_attn.q_proj", **GROUPED}),
        ("llama", {"match": "*.1.self_attn.v_proj", **PIVOTED}),
        ("qwen2", {"match": "*.1.self_attn.q_proj", **LOW}),
    ],
    ids=["grouped", "pivoted", "bias"],
)
def test_attention_that_vllm_cannot_shard_is_refused(
    architecture: str, rule: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn: .* 2 devices .* low_rank without"):
        shard_in_vllm(slim(tiny_model(architecture), rule), 2)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_model_is_sharded_where_vllm_builds_it(
    devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = ModuleType("vllm.distributed")
    module.get_tensor_model_parallel_world_size = lambda: devices
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(modeling_llmslim, "is_built_by_vllm", lambda _: True)
    made = slim(tiny_model("llama"), {"role": "mlp", **LOW})
    model = type(made)(made.config)
    found = "model.layers.3.mlp.up_proj.up" in model.tp_plan
    assert found == (devices > 1)
