"""A loaded slim model is a model like any other: to peft, accelerate, the compiler and autograd."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import logits, tiny_model, tokens
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import llmslim

RECIPE = {
    "replace": [
        {"match": ["*.gate_proj", "*.down_proj"], "structure": "grouped_pointwise", "groups": 4},
        {"match": "*.up_proj", "structure": "low_rank", "rank": 8},
    ]
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("llama")
    llmslim.slim(model, RECIPE)
    path = tmp_path_factory.mktemp("slim") / "checkpoint"
    model.save_pretrained(path)
    return path


def load(path: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def test_is_a_model_of_its_base_class(checkpoint: Path) -> None:
    assert isinstance(load(checkpoint), LlamaForCausalLM)


def test_gradients_reach_every_block_also_with_checkpointing(checkpoint: Path) -> None:
    plain, recomputed = load(checkpoint).train(), load(checkpoint).train()
    recomputed.activation_checkpointing_enable()
    ids = tokens()
    for model in (plain, recomputed):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert a.grad.abs().max() > 0, name
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


def test_peft_trains_what_stayed_dense_and_blocks_in_full(checkpoint: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = load(checkpoint)
    expected = logits(model, tokens())
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["up_proj"])
    wrapped = get_peft_model(model, config)
    assert torch.equal(logits(wrapped, tokens()), expected)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert any("lora_" in name for name in trained)
    assert any("up_proj.modules_to_save" in name for name in trained)
    assert torch.allclose(logits(wrapped.merge_and_unload(), tokens()), expected)


def test_device_map_auto(checkpoint: Path) -> None:
    model = load(checkpoint, device_map="auto")
    assert torch.equal(logits(model, tokens()), logits(load(checkpoint), tokens()))


def test_offloaded_to_disk(checkpoint: Path, tmp_path: Path) -> None:
    device_map = {
        "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu",
        "lm_head": "cpu", "model.layers.0": "disk", "model.layers.1": "disk",
        "model.layers.2": "cpu", "model.layers.3": "disk",
    }  # fmt: skip
    model = load(checkpoint, device_map=device_map, offload_folder=str(tmp_path))
    assert torch.equal(logits(model, tokens()), logits(load(checkpoint), tokens()))


def test_compiled_is_the_same(checkpoint: Path) -> None:
    model = load(checkpoint)
    expected = logits(model, tokens())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(logits(compiled, tokens()), expected, atol=1e-5)


def test_bfloat16_stays_near_and_round_trips(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    full = logits(load(checkpoint), tokens())
    assert torch.nn.functional.cosine_similarity(
        logits(model, tokens()).float().flatten(), full.flatten(), dim=0
    ) > 0.999  # fmt: skip
    model.save_pretrained(tmp_path / "bf16")
    assert torch.equal(logits(load(tmp_path / "bf16"), tokens()), logits(model, tokens()))


def test_missing_left_over_and_misshapen_weights_are_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    block = "model.layers.0.mlp.up_proj.down.weight"
    messages = {
        "missing": block,
        "left-over": "model.layers.0.mlp.up_proj.weight",
        "shape": "ignore_mismatched_sizes",
    }
    for change, message in messages.items():
        folder = tmp_path / change
        shutil.copytree(checkpoint, folder)
        weights = load_file(folder / "model.safetensors")
        if change == "missing":
            del weights[block]
        elif change == "left-over":
            weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 48)
        else:
            weights[block] = torch.zeros(3, 3)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises((ValueError, RuntimeError), match=message):
            load(folder)


GUARD = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "llmslim":
            raise ModuleNotFoundError("llmslim is not installed here", name=name)

sys.meta_path.insert(0, Blocked())
"""


def run(code: str, *args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, check=False,
    )  # fmt: skip


def test_fresh_process_without_llmslim(checkpoint: Path, tmp_path: Path) -> None:
    """Bitwise the same logits where llmslim cannot be imported, and again after a second save."""
    torch.save(logits(load(checkpoint), tokens()), tmp_path / "expected.pt")
    torch.save(tokens(), tmp_path / "ids.pt")
    code = GUARD + textwrap.dedent("""
        import torch
        from transformers import AutoModelForCausalLM
        path, expected, ids = sys.argv[1], torch.load("expected.pt"), torch.load("ids.pt")
        for place in (path, "again"):
            model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
            with torch.no_grad():
                assert torch.equal(model(ids, use_cache=False).logits, expected), place
            model.save_pretrained("again")
        assert "llmslim" not in sys.modules
        print("same")
    """)
    done = run(code, checkpoint, cwd=tmp_path)
    assert done.stdout.strip() == "same", done.stderr[-2000:]
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow  # test_checkpoint_write.py sees the refusal too
def test_fresh_process_with_neither_is_a_clear_error(checkpoint: Path, tmp_path: Path) -> None:
    code = (
        GUARD + "from transformers import AutoModelForCausalLM as A\nA.from_pretrained(sys.argv[1])"
    )
    done = run(code, checkpoint, cwd=tmp_path)
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("first", ["transformers", pytest.param("llmslim", marks=pytest.mark.slow)])
def test_importing_llmslim_is_enough(checkpoint: Path, tmp_path: Path, first: str) -> None:
    second = {"llmslim": "transformers", "transformers": "llmslim"}[first]
    code = f"""
        import sys
        import {first}
        from transformers import AutoModelForCausalLM
        import {second}
        print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
    """
    done = run(code, checkpoint, cwd=tmp_path)
    assert done.stdout.strip() == "SlimLlamaForCausalLM", done.stderr[-2000:]


def test_importing_llmslim_loads_no_torch(tmp_path: Path) -> None:
    code = "import llmslim, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert run(code, cwd=tmp_path).stdout.strip() == "[]"


def test_exports_are_what_can_be_imported() -> None:
    assert list(llmslim.__all__) == sorted(llmslim.__all__)
    for name in llmslim.__all__:
        assert getattr(llmslim, name).__module__.startswith("llmslim")
    with pytest.raises(AttributeError, match="'nothing'"):
        llmslim.nothing  # noqa: B018


def test_every_type_that_a_public_signature_names_is_public() -> None:
    public = {name: getattr(llmslim, name) for name in llmslim.__all__}
    for name, thing in public.items():
        members = vars(thing) if inspect.isclass(thing) else {name: thing}
        for member, value in members.items():
            function = getattr(value, "fget", getattr(value, "__func__", value))
            if not inspect.isfunction(function) or member.startswith("_"):
                continue
            if not function.__module__.startswith("llmslim"):  # pydantic's
                continue
            local = {**public, **(members if inspect.isclass(thing) else {})}
            hints = typing.get_type_hints(function, localns=local)
            ours = {
                kind
                for hint in hints.values()
                for kind in _classes_in(hint)
                if kind.__module__.startswith("llmslim.") and "." not in kind.__qualname__
            }
            assert {kind.__name__ for kind in ours} <= public.keys(), f"{name}.{member}"


def _classes_in(hint: Any) -> Iterator[type]:
    if isinstance(hint, type):
        yield hint
    for part in typing.get_args(hint):
        yield from _classes_in(part)
    if isinstance(hint, list):
        for part in hint:
            yield from _classes_in(part)
