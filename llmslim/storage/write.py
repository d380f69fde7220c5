"""Write a checkpoint so that a folder of its name is always a whole one.

Everything goes into a temporary folder beside the target, is flushed to the disk, loaded back
and compared byte for byte with the model in memory; then one rename puts it in place. Whatever
happens before that, a full disk or Ctrl-C, removes the temporary folder and leaves the target as
it was. A second write of the same model gives the same bytes.

What it costs: the comparison holds the model twice for a moment. Left out: a process that is
killed outright leaves its temporary folder (`.<name>.partial-…`) behind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmslim.atomic import all_files, flush, staged
from llmslim.errors import CheckpointError
from llmslim.modeling.base_class import auto_class_of
from llmslim.modeling.configuration_llmslim import register

from .companions import LEGACY_TEMPLATE, copy_companions
from .load import load_tokenizer
from .manifest import write_manifest
from .pieces import NotInPiecesError, Pieces
from .source import CARD, Source, first_line, open_source, quiet

MAX_SHARD_SIZE = "50GB"
"""What `save_pretrained` does by itself."""
REPORT = "llmslim_report.json"
RECIPE = "recipe.yaml"
HISTORY = "healing_history.jsonl"
"""Losses of a healing, step by step."""

_TOKENS = 6
_CLOSE, _CLOSE_NARROW = 1e-4, 5e-2
"""Standard deviations of the logits that the order of sums may account for: where memory lies
otherwise they may be added up otherwise. The second one is for types narrower than float32."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_PROBE = "The quick brown fox, 42 jumps; over\n\tthe lazy dog. Ünïcödé"


class Companions(TypedDict, total=False):
    """What belongs beside a model's config and weights."""

    source: Source | None
    """The model it was made from; listed in the manifest, and its processors come along."""
    tokenizer: PreTrainedTokenizerBase | None
    """Saved with its chat template."""
    report: dict[str, Any] | None
    """Written as `llmslim_report.json`."""
    recipe_text: str
    """Written as `recipe.yaml`."""
    model_card: str
    """Written as `README.md`."""
    files: Mapping[str, bytes]
    """More files by name, written as they are."""


def write_checkpoint(
    model: PreTrainedModel,
    out: Path,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
    **companions: Unpack[Companions],
) -> Path:
    """Write a model, slim or not, with all that belongs to it.

    Args:
        model: the model; all its weights of one type, its own config's.
        out: the folder to write.
        max_shard_size: bytes in one file of weights, as `parse_size` reads them.
        overwrite: whether a checkpoint that is there already may be replaced.
        **companions: what is written beside it.

    Returns:
        `out`.

    Raises:
        CheckpointError: if it cannot be written, or does not load back as it is in memory.
    """
    with staged(out, overwrite) as partial:
        try:
            with quiet():
                model.save_pretrained(partial, max_shard_size=max_shard_size)
        except ValueError as error:  # transformers' word for a model that no files can hold
            raise CheckpointError(f"{out.name}: not written. {error}") from error
        write_companions(partial, trusted=model.is_remote_code(), **companions)
        write_manifest(partial, source=companions.get("source"))
        flush_all(partial)
        _check_model(model, partial)
        check_tokenizer(companions.get("tokenizer"), partial)
    return out


def write_companions(
    folder: Path, *, trusted: bool = False, **companions: Unpack[Companions]
) -> None:
    """Write what belongs beside config and weights, and give every file the same mode.

    Args:
        folder: holds config and weights.
        trusted: as for `copy_companions`.
        **companions: what is written.
    """
    source, tokenizer = companions.get("source"), companions.get("tokenizer")
    if tokenizer is not None:
        # Files of its templates beside a processor's of the legacy kind are refused, or taken for
        # the processor's.
        home = None if source is None else source.path
        legacy = home is not None and (home / LEGACY_TEMPLATE).is_file()
        form: dict[str, Any] = {"save_jinja_files": False} if legacy else {}
        with quiet():
            tokenizer.save_pretrained(folder, **form)
    copy_companions(folder, source, trusted=trusted)
    files = dict(companions.get("files", {}))
    if (report := companions.get("report")) is not None:
        files[REPORT] = f"{json.dumps(report, indent=2)}\n".encode()
    if "recipe_text" in companions:
        files[RECIPE] = companions["recipe_text"].encode()
    if "model_card" in companions:
        files[CARD] = companions["model_card"].encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    # safetensors makes its files private; give them the mode that every other file has.
    mode = (folder / "config.json").stat().st_mode
    for file in all_files(folder):
        file.chmod(mode)


def flush_all(folder: Path) -> None:
    """Wait until a folder and all its files are on the disk."""
    for file in all_files(folder):
        flush(file)
    flush(folder)


def _check_model(model: PreTrainedModel, folder: Path) -> None:
    """Load the checkpoint as a user would and compare it with the model.

    Raises:
        CheckpointError: if it does not load, any tensor differs in name, shape, type or bytes, or
            it computes something else.
    """
    register()
    try:
        with quiet():
            trusted = model.is_remote_code()
            auto = auto_class_of(model.config, trust_remote_code=trusted)
            again: Any = auto.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:  # the loaders' own errors are of many classes
        raise CheckpointError(
            f"{folder.name}: what was written does not load ({first_line(error)})."
        ) from error
    _refuse_other_class(folder, type(model).__name__, again)
    wanted, loaded = model.state_dict(), again.state_dict()
    _refuse_different(
        folder,
        wanted.keys() ^ loaded.keys()
        or {name for name, tensor in wanted.items() if not _identical(tensor, loaded[name])},
    )
    check_same_logits(model, again, folder.name)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Load the tokenizer, if there is one, back and compare it.

    Raises:
        CheckpointError: if it does not load, or encodes or chats differently.
    """
    if tokenizer is None:
        return
    brought = type(tokenizer).__module__.startswith("transformers_modules.")
    again = load_tokenizer(folder, trust_remote_code=brought)
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


def check_loads(
    folder: Path, tensors: Mapping[str, Tensor], kind: str, device: torch.device
) -> Pieces:
    """Hold the headers of a checkpoint against the model that its config describes.

    Nothing is read but headers: this is for a checkpoint whose bytes were compared already.

    Args:
        folder: the checkpoint.
        tensors: names, shapes and types of every tensor that the model is to have.
        kind: name of its class.
        device: where its pieces will be.

    Returns:
        Its pieces.

    Raises:
        CheckpointError: if it does not load as that model.
    """
    try:
        source = open_source(folder)
        dtype = str(source.config.dtype).removeprefix("torch.")
        pieces = Pieces(source, dtype=dtype, device=device, tried=False)
    except (CheckpointError, NotInPiecesError) as error:
        raise CheckpointError(
            f"{folder.name}: what was written does not load ({error})."
        ) from error
    _refuse_other_class(folder, kind, pieces.model)
    wanted, loaded = (
        {name: (tensor.shape, tensor.dtype) for name, tensor in some.items()}
        for some in (tensors, pieces.model.state_dict())
    )
    _refuse_different(folder, {*pieces.unused, *(n for n, _ in wanted.items() ^ loaded.items())})
    return pieces


def _refuse_other_class(folder: Path, kind: str, loaded: PreTrainedModel) -> None:
    if type(loaded).__name__ != kind:
        raise CheckpointError(
            f"{folder.name}: written as {kind}, loads as {type(loaded).__name__}; only language "
            "models that transformers' Auto classes find can be written."
        )


def _refuse_different(folder: Path, names: set[str]) -> None:
    if names:
        raise CheckpointError(
            f"{folder.name}: {len(names)} tensors load back differently, such as {min(names)}; all "
            "weights of a checkpoint must be of one type and untied from each other, or tied as "
            "its config has it."
        )


@torch.no_grad()
def check_same_logits(made: PreTrainedModel, again: PreTrainedModel, where: str) -> None:
    """Run a model and what was loaded of it on a few tokens.

    Both hold the same bytes by now: this is about what is not stored, but worked out when a model
    is built.

    Args:
        made: the model that was written.
        again: the one that was loaded; moved to the device of the other.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: if what they give differs by more than the order of sums accounts for.
    """
    vocabulary = made.get_input_embeddings().num_embeddings
    ids = torch.arange(_TOKENS, device=made.device)[None] % int(vocabulary)  # type: ignore[arg-type]
    modes = [(module, module.training) for module in made.modules()]
    try:
        wanted = _logits(made.eval(), ids)
    except Exception:  # it needs more than text, and its bytes and code are compared
        return
    finally:
        for module, training in modes:
            module.training = training
    found = _logits(again.to(made.device).eval(), ids)  # type: ignore[arg-type]
    finite = wanted.isfinite()
    size = float(wanted[finite].std()) if int(finite.sum()) > 1 else 1.0
    close = _CLOSE * size if wanted.dtype == torch.float32 else _CLOSE_NARROW * size
    same = torch.equal(finite, found.isfinite())
    far = float((wanted - found)[finite].abs().max()) if same and bool(finite.any()) else 0.0
    if not same or far > close:
        raise CheckpointError(
            f"{where}: what was written computes something else than what was made (logits differ "
            f"by {far / size:.2g} standard deviations). This is a fault of llmslim; leave out "
            "depth, width or the rules of the recipe until it is gone."
        )


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def parse_size(size: int | str) -> int:
    """Return a number of bytes, given as such or as text.

    Args:
        size: `5GB`, `500MB`, `5000000`; units are powers of ten, as on the hub.

    Raises:
        CheckpointError: if it is no size.

    Example:
        >>> parse_size("1.5GB")
        1500000000
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)B?", str(size).strip().upper())
    number = 0 if match is None else int(float(match[1]) * _UNITS[match[2]])
    if number < 1:
        raise CheckpointError(
            f"max_shard_size: {size!r}; a number of bytes, or of KB, MB, GB or TB. Write 5GB."
        )
    return number
