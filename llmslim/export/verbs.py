"""From a checkpoint to each other form, and to the hub: the verbs of `llmslim` that do so."""

from __future__ import annotations

from pathlib import Path

from llmslim.storage import (
    check_keeps_source,
    check_target,
    load_finite,
    load_tokenizer,
    open_source,
    write_checkpoint,
)

from .dense import dense_copy
from .gguf import check_gguf_export, write_gguf
from .hub import plan_upload
from .hub import push as upload
from .onnx import check_onnx_export, write_onnx


def export_dense(
    path: str | Path, out: str | Path, *, overwrite: bool = False, allow_nonfinite: bool = False
) -> Path:
    """Write an ordinary checkpoint of the base class that computes the same as a slim one.

    Args:
        path: a slim checkpoint.
        out: folder to write; must not exist, unless `overwrite`.
        overwrite: replace an existing folder once the new one is complete.
        allow_nonfinite: accept weights that are NaN or infinite.

    Raises:
        CheckpointError: if it is not a slim checkpoint, has no dense equivalent, or has such
            weights.
    """
    target = Path(out)
    check_target(target, overwrite)
    source = open_source(path)
    check_keeps_source(target, source.path, source.given)
    dense = dense_copy(load_finite(source, allow_nonfinite=allow_nonfinite))
    tokenizer = load_tokenizer(source)
    return write_checkpoint(dense, target, source=source, tokenizer=tokenizer, overwrite=overwrite)


def export_gguf(
    path: str | Path,
    out: str | Path,
    *,
    quantize: str = "f16",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> Path:
    """Write a model as a GGUF file for llama.cpp, with its tokenizer and chat template.

    Blocks are multiplied out. Layers of different widths keep them where llama.cpp can read that
    (its architecture `deci`: Llama, Mistral, Qwen2, Phi-3), and are padded with zeros elsewhere.

    Args:
        path: a slim checkpoint or any other causal language model that llama.cpp knows.
        out: file to write; must not exist, unless `overwrite`.
        quantize: `f32`, `f16`, `q8_0` or `q4_0`: the type of its matrices.
        overwrite: replace an existing file once the new one is complete.
        allow_nonfinite: accept weights that are NaN or infinite.

    Raises:
        CheckpointError: if llama.cpp has no form for the model or its tokenizer, the model has
            such weights, or the package `gguf` is missing.
    """
    target = Path(out)
    check_gguf_export(target, quantize, overwrite=overwrite)
    source = open_source(path)
    model = load_finite(source, allow_nonfinite=allow_nonfinite)
    tokenizer = load_tokenizer(source)
    return write_gguf(model, target, name=source.name, tokenizer=tokenizer, quantize=quantize)


def export_onnx(
    path: str | Path, out: str | Path, *, overwrite: bool = False, allow_nonfinite: bool = False
) -> Path:
    """Write a causal language model as ONNX, in float32, with config and tokenizer beside it.

    The graph takes prompts of any number and length, padded on the left or not, and the keys and
    values of the tokens before; `llmslim/export/onnx.py` has its inputs and outputs. It is run once
    and compared with the model where onnxruntime is installed.

    Args:
        path: a slim checkpoint or any other causal language model.
        out: folder to write, with `model.onnx` in it; must not exist, unless `overwrite`.
        overwrite: replace an existing folder once the new one is complete.
        allow_nonfinite: accept weights that are NaN or infinite.

    Raises:
        CheckpointError: if the model has no ONNX form or such weights, the graph computes something
            else, or the packages onnx and onnxscript are missing.
    """
    target = Path(out)
    check_onnx_export(target, overwrite=overwrite)
    source = open_source(path)
    check_keeps_source(target, source.path, source.given)
    model = load_finite(source, dtype="float32", allow_nonfinite=allow_nonfinite)
    tokenizer = load_tokenizer(source)
    return write_onnx(model, target, source=source, tokenizer=tokenizer, overwrite=overwrite)


def push(path: str | Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a checkpoint to the hub, with its card, report, recipe and manifest, in one commit.

    Args:
        path: what `convert`, `heal`, `save` or `export_dense` wrote; its scores go into the card.
        repo: its name on the hub, `owner/name`; made where there is none.
        private: whether a repository that is made is private.
        revision: branch; the main one by default.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: if the checkpoint is not whole, or the hub cannot be reached or refuses.
    """
    return upload(plan_upload(Path(path), repo), private=private, revision=revision)
