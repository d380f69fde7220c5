"""Write a checkpoint so that a folder of its name is always a whole one.

Everything goes into a temporary folder beside the target, is flushed to the disk, loaded back
and compared byte for byte with the model in memory; then one rename puts it in place. Whatever
happens before that, a full disk or Ctrl-C, removes the temporary folder and leaves the target as
it was. A second write of the same model gives the same bytes.

What it costs: the comparison holds the model twice for a moment. Left out: a process that is
killed outright leaves its temporary folder (`.<name>.partial-…`) behind.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmslim.errors import CheckpointError
from llmslim.modeling.configuration_llmslim import register

from .load import load_tokenizer
from .manifest import write_manifest
from .quiet import quiet
from .source import Source, first_line

REPORT = "llmslim_report.json"
RECIPE = "recipe.yaml"
CARD = "README.md"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PROBE = "The quick brown fox, 42 jumps; over\n\tthe lazy dog. Ünïcödé"


def check_target(out: Path, overwrite: bool = False) -> None:
    """Refuse a target that cannot be written, before any work is done for it.

    Args:
        out: the folder to write.
        overwrite: whether a checkpoint that is there already may be replaced.

    Raises:
        CheckpointError: if something is there that may not be replaced, or nothing can be
            written beside it.
    """
    if os.path.lexists(out):
        if not overwrite:
            raise CheckpointError(
                f"{out}: exists already; a checkpoint is written to a new folder. Choose another "
                "name, or pass overwrite (--overwrite) to replace it."
            )
        real = out.resolve()
        if not real.is_dir():
            raise CheckpointError(f"{out}: not a folder; only a folder can be overwritten.")
        if any(real.iterdir()) and not (real / "config.json").is_file():
            raise CheckpointError(
                f"{out}: holds files but no config.json; only a checkpoint or an empty folder can "
                "be overwritten. Choose another name."
            )
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{out}: {parent} is not a folder that you can write to.")


def write_checkpoint(
    model: PreTrainedModel,
    out: Path,
    *,
    source: Source | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    report: dict[str, Any] | None = None,
    recipe_text: str | None = None,
    model_card: str | None = None,
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model, slim or not, with all that belongs to it.

    Args:
        model: the model; all its weights of one type, its own config's.
        out: the folder to write.
        source: the model it was made from; listed in the manifest.
        tokenizer: saved beside the weights, with its chat template.
        report: written as `llmslim_report.json`.
        recipe_text: written as `recipe.yaml`.
        model_card: written as `README.md`.
        files: more files by name, written as they are.
        overwrite: whether a checkpoint that is there already may be replaced.

    Returns:
        `out`.

    Raises:
        CheckpointError: if it cannot be written, or does not load back as it is in memory.
    """
    with _staged(out, overwrite) as partial:
        with quiet():
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        if report is not None:
            _write_text(partial / REPORT, json.dumps(report, indent=2) + "\n")
        if recipe_text is not None:
            _write_text(partial / RECIPE, recipe_text)
        if model_card is not None:
            _write_text(partial / CARD, model_card)
        for name, content in (files or {}).items():
            (partial / name).write_bytes(content)
        # safetensors makes its files private; give them the mode that every other file has.
        mode = (partial / "config.json").stat().st_mode
        for file in _walk(partial):
            file.chmod(mode)
        write_manifest(partial, source=source)
        for file in _walk(partial):
            _flush(file)
        _flush(partial)
        _check_model(model, partial)
        if tokenizer is not None:
            _check_tokenizer(tokenizer, partial)
    return out


@contextmanager
def _staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """Lend a new folder beside `out`, and rename it to `out` if all goes well.

    Raises:
        CheckpointError: if `out` cannot be written; the folder is gone and `out` as it was.
    """
    check_target(out, overwrite)
    target = out.resolve()  # a link to a folder stays a link
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        _publish(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        number = _error_number(error)
        if number is None or isinstance(error, CheckpointError):
            raise
        why = "no space left for it" if number in _FULL else "it cannot be written"
        what = " Free some space or choose another disk." if number in _FULL else ""
        raise CheckpointError(f"{out}: {why} ({os.strerror(number)}).{what}") from error


def _publish(partial: Path, target: Path) -> None:
    """Rename the finished folder; what it replaces is removed only after that."""
    old = None
    if target.exists():
        old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
        target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        if old is not None:
            old.rename(target)
        raise
    _flush(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _check_model(model: PreTrainedModel, folder: Path) -> None:
    """Load the checkpoint as a user would and compare it with the model.

    Raises:
        CheckpointError: if it does not load, or any tensor differs in name, shape, type or bytes.
    """
    register()
    try:
        with quiet():
            again: Any = AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=model.is_remote_code()
            )
    except Exception as error:  # the loaders' own errors are of many classes
        raise CheckpointError(
            f"{folder.name}: what was written does not load ({first_line(error)})."
        ) from error
    if type(again).__name__ != type(model).__name__:
        raise CheckpointError(
            f"{folder.name}: written as {type(model).__name__}, loads as {type(again).__name__}; "
            "only causal language models that AutoModelForCausalLM finds can be written."
        )
    wanted, loaded = model.state_dict(), again.state_dict()
    different = sorted(wanted.keys() ^ loaded.keys()) or [
        name for name, tensor in wanted.items() if not _identical(tensor, loaded[name])
    ]
    if different:
        raise CheckpointError(
            f"{folder.name}: {len(different)} tensors load back differently, such as "
            f"{different[0]}; all weights of a checkpoint must be of one type and untied from "
            "each other, or tied as its config says."
        )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Load the tokenizer back and compare it.

    Raises:
        CheckpointError: if it does not load, or encodes or chats differently.
    """
    again = load_tokenizer(folder)
    if (
        again is None
        or again.get_vocab() != tokenizer.get_vocab()
        or again(_PROBE)["input_ids"] != tokenizer(_PROBE)["input_ids"]
        or again.chat_template != tokenizer.chat_template
    ):
        raise CheckpointError(
            f"{folder.name}: the tokenizer loads back as another one; "
            f"{type(tokenizer).__name__} cannot be saved. Leave the tokenizer out."
        )


def _identical(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same bytes; NaNs count as equal to themselves."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def _error_number(error: BaseException) -> int | None:
    """Return the operating system's error number behind an error, None if there is none."""
    if isinstance(error, OSError):
        return error.errno
    # safetensors has an error class of its own and leaves the number in its text.
    text = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return int(text[1]) if text else None


def _walk(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
