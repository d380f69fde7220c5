"""vLLM's Transformers backend runs slim models, and writes what transformers writes greedily.

The slow tests need vLLM, which has an environment of its own: scripts/vllm makes it and runs them.
The others show by themselves what it relies on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as tf
from tiny import logits, tiny_model, tokens

import llmslim
from llmslim._autoregister import register_when_imported
from llmslim.modeling.modeling_llmslim import replace_sites
from llmslim.modeling.pivoted_low_rank import PivotedLowRank
from llmslim.storage.write import write_checkpoint

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    # Reason to skip: vLLM wants older versions than the other tests; scripts/vllm runs these.
    reason="no vLLM: run scripts/vllm",
)
PROMPT, NEW = list(range(3, 35)), 24
HALF: dict[str, Any] = {"init": "project", "keep_ratio": 0.5}
GROUPS: dict[str, Any] = {"init": "project", "structure": "grouped_pointwise", "groups": 4}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "grouped": [{"role": ["attention", "mlp"], **GROUPS}],
    "learned order": [{"role": "mlp", **GROUPS, "channel_order": "learned"}],
    "low rank": [{"role": ["attention", "mlp"], "structure": "low_rank", **HALF}],
    "pivoted low rank": [{"role": ["attention", "mlp"], "structure": "pivoted_low_rank", **HALF}],
    "block_shuffle, grouped_low_rank": [
        {
            "match": "*.down_proj",
            "structure": "block_shuffle",
            "init": "project",
            "keep_ratio": 0.4,
        },
        {
            "role": "mlp",
            "structure": "grouped_low_rank",
            "groups": 8,
            "rank": 16,
            "init": "project",
        },
    ],
    "narrower, each layer its own": [
        {"match": "*.1.mlp.*", "structure": "width", **HALF},
        {"match": "*.2.mlp.*", "structure": "width", "init": "project", "keep_ratio": 0.75},
    ],
    # vLLM joins projections of all modules of a class, by what it sees in one of them.
    "blocks beside dense projections": [
        {"match": "*.1.mlp.*", "structure": "low_rank", **HALF},
        {"match": "*.2.self_attn.q_proj", "structure": "low_rank", **HALF},
        {"match": "*.0.self_attn.o_proj", "structure": "pivoted_low_rank", **HALF},
        {"match": "*.2.mlp.down_proj", **GROUPS},
    ],
    "experts": [{"role": "experts", "structure": "low_rank", **HALF}],
}
SCRIPT = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
folder, prompt, new, trusted, devices = json.loads(sys.argv[1])
model = LLM(
    folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128,
    max_num_seqs=4, kv_cache_memory_bytes=2**26, trust_remote_code=trusted,
    tensor_parallel_size=devices,
)
wanted = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
made = model.generate([{"prompt_token_ids": prompt}], wanted)
print("tokens", json.dumps(list(made[0].outputs[0].token_ids)))
"""


def dense(kind: str) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "max_position_embeddings": 256, "initializer_range": 0.08, "eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "experts":
        few = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
        return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**sizes, **few)).eval()
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).eval()


def run_vllm(
    folder: Path, *, new: int = NEW, trusted: bool = False, devices: int = 1
) -> tuple[list[int], str]:
    """Return the new tokens, and all that was printed.

    llmslim is vLLM's plug-in, or the code beside the weights is used. A device is a process.
    """
    given = json.dumps([str(folder), PROMPT, new, trusted, devices])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, given],
        env=os.environ
        | {"HF_MODULES_CACHE": str(folder.parent / "code"), "VLLM_CPU_KVCACHE_SPACE": "1"}
        | ({"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if devices > 1 else {})
        | ({"VLLM_PLUGINS": ""} if trusted else {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("tokens ")]
    tokens: list[int] = json.loads(found[0].removeprefix("tokens ")) if found else []
    return tokens, done.stdout + done.stderr


def slim_and_tokens(name: str, folder: Path, new: int) -> list[int]:
    """Write a slim model; return the tokens that transformers makes with it."""
    model = dense(name)
    llmslim.slim(model, {"name": name, "replace": RECIPES[name]})
    ids = torch.tensor([PROMPT])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, pad_token_id=0
    )
    write_checkpoint(model, folder)
    tokens: list[int] = made[0, len(PROMPT) :].tolist()
    return tokens


@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize(
    ("name", "trusted"),
    [
        *((name, False) for name in RECIPES),
        ("blocks beside dense projections", True),
        ("learned order", True),
    ],
)
def test_the_same_tokens(name: str, trusted: bool, tmp_path: Path) -> None:
    expected = slim_and_tokens(name, tmp_path / "slim", NEW)
    found, printed = run_vllm(tmp_path / "slim", trusted=trusted)
    assert found == expected, printed[-3000:]


@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize(
    "name",
    ["low rank", "blocks beside dense projections", "narrower, each layer its own", "experts"],
)
def test_the_same_tokens_on_two_devices(name: str, tmp_path: Path) -> None:
    """Few tokens: with two processes that wait for one another each takes a second or more."""
    expected = slim_and_tokens(name, tmp_path / "slim", 6)
    found, printed = run_vllm(tmp_path / "slim", new=6, devices=2)
    assert found == expected, printed[-3000:]


@pytest.mark.slow
@needs_vllm
def test_attention_that_two_devices_cannot_share_is_refused(tmp_path: Path) -> None:
    slim_and_tokens("grouped", tmp_path / "slim", 1)
    found, printed = run_vllm(tmp_path / "slim", new=1, devices=2)
    assert not found
    assert "ValueError: layers.0.self_attn: vLLM gives each of 2 devices" in printed


class Registry:
    """vLLM's table of architectures, as far as a plug-in sees it."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def register_model(self, name: str, home: str) -> None:
        self.known[name] = home


def test_architectures_are_named_where_vllm_is(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("vllm.model_executor.models.registry")
    module.ModelRegistry = Registry()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    register_when_imported()
    slim = tiny_model("qwen3")
    llmslim.slim(slim, {"name": "x", "replace": RECIPES["grouped"]})
    home = "vllm.model_executor.models.transformers:TransformersForCausalLM"
    assert module.ModelRegistry.known[slim.config.architectures[0]] == home


def block(model: Any, name: str) -> dict[str, Any]:
    site = model.get_submodule(name)
    sizes = {"in_features": site.in_features, "out_features": site.out_features}
    return {"structure": "pivoted_low_rank", "rank": 4, "bias": False, **sizes}


@pytest.mark.parametrize("attention", ["vllm", "sdpa"])
def test_modules_with_blocks_have_classes_of_their_own_in_vllm(attention: str) -> None:
    model = tiny_model("llama")
    names = ("0.mlp.up_proj", "1.mlp.up_proj", "2.mlp.down_proj", "2.self_attn.o_proj")
    model.config._attn_implementation = attention
    replace_sites(model, {n: block(model, n) for each in names if (n := f"model.layers.{each}")})
    model.config._attn_implementation = "sdpa"
    mlps = [type(layer.mlp) for layer in model.model.layers]
    base = type(tiny_model("llama").model.layers[0].mlp)
    assert all(issubclass(mlp, base) and mlp.__name__ == base.__name__ for mlp in mlps)
    assert mlps[3] is base
    # One class for all whose blocks have the same places.
    assert [mlps[0] is mlps[1], mlps[1] is mlps[2], mlps[2] is base] == (
        [True, False, False] if attention == "vllm" else [True, True, True]
    )
    assert (type(model.model.layers[2].self_attn) is type(model.model.layers[0].self_attn)) == (
        attention != "vllm"
    )
    again = tiny_model("llama")
    replace_sites(again, {n: block(again, n) for each in names if (n := f"model.layers.{each}")})
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, tokens()), logits(again, tokens()))


def test_buffers_are_in_memory_where_only_parameters_are_not() -> None:
    """vLLM moves parameters to the meta device one by one, and fills both from the files."""
    model = tiny_model("llama").to("meta")
    name = "model.layers.0.mlp.up_proj"
    replace_sites(model, {name: block(model, name)})
    made = model.get_submodule(name)
    assert isinstance(made, PivotedLowRank)
    assert all(parameter.is_meta for parameter in made.parameters())
    assert made.order.device.type == "cpu"
    with torch.device("meta"):
        replace_sites(model, {name: block(model, name)})
    assert model.get_submodule(name).order.is_meta
