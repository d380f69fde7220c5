"""What the checkpoint tests share: slim models made by hand, a tokenizer, files and hashes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmslim.errors import CheckpointError
from llmslim.modeling.modeling_llmslim import become_slim, set_module
from llmslim.modeling.structured import build

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def make_slim(model: Any, structures: dict[str, dict[str, Any]], seed: int = 5) -> Any:
    """Put random blocks at every module whose name ends like a key; biases are carried over."""
    torch.manual_seed(seed)
    sites = {}
    for name, module in list(model.named_modules()):
        options = next((v for k, v in structures.items() if name.endswith(k)), None)
        if options is None:
            continue
        shape = tuple(module.weight.shape)
        rows, columns = shape if type(module).__name__ == "Conv1D" else shape[::-1]
        spec = {
            "in_features": rows,
            "out_features": columns,
            "bias": getattr(module, "bias", None) is not None,
            **options,
        }
        block = build(spec, dtype=module.weight.dtype)
        if spec["bias"]:
            block.bias.data.copy_(module.bias.data)
        sites[name] = spec
        set_module(model, name, block)
    assert sites
    become_slim(model, sites)
    return model.eval()


def slim_llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a slim 4-layer Llama: grouped MLPs and low-rank attention outputs."""
    model = tiny_model("llama", **changes)
    for parameter in model.parameters():  # but not the rotary table, as from_pretrained does it
        parameter.data = parameter.data.to(dtype)
    return make_slim(
        model,
        {
            "mlp.up_proj": {"structure": "grouped_pointwise", "groups": 4},
            "self_attn.o_proj": {"structure": "low_rank", "rank": 5},
        },
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 96 tokens with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:94]
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor in a folder's safetensors files, read by safetensors itself."""
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors have the same type, shape and bytes."""
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def names(folder: Path) -> list[str]:
    """Return the names of what lies in a folder, hidden things too, sorted."""
    return sorted(path.name for path in folder.iterdir())


def refused(call: Any, *args: Any, **options: Any) -> str:
    """Return what a call is refused with."""
    with pytest.raises(CheckpointError) as caught:
        call(*args, **options)
    return str(caught.value)


def disk_order(monkeypatch: pytest.MonkeyPatch, move: str) -> list[int | Path]:
    """Return a list that fills with what reaches the disk, in order.

    Args:
        monkeypatch: watches as long as its patches hold.
        move: `rename` or `replace`, whichever gives the files their names.

    Returns:
        The inode of what is flushed, the path of what gets its name.
    """
    done: list[int | Path] = []
    fsync, moved = os.fsync, getattr(Path, move)

    def noted_fsync(descriptor: int) -> None:
        done.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def noted_move(path: Path, target: Path) -> Path:
        done.append(Path(target))
        return moved(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, move, noted_move)
    return done
