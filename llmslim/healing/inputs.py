"""Everything that a healing needs, found, loaded and checked before anything is trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmslim.checkpoint import (
    Source,
    check_finite,
    load_model,
    load_tokenizer,
    open_source,
    quiet,
)
from llmslim.data import Rows, embedding_rows, healing_text, longest_input
from llmslim.errors import HealingError
from llmslim.healing.packing_check import sees_neighbours
from llmslim.healing.processes import processes
from llmslim.healing.slim_folder import SlimFolder, read_slim_folder
from llmslim.recipe import Heal, HealSource, Recipe
from llmslim.surgery import Progress


@dataclass(frozen=True)
class Ready:
    """A model that can be healed, and what with."""

    model: Any
    spec: Heal
    text: Any
    """Rows to train on and rows held out."""
    tokenizer: Any = None
    teacher: Any = None
    source: Source | None = None
    """The checkpoint; None for a model in memory."""
    folder: SlimFolder = field(default_factory=SlimFolder)
    mixes: bool = False
    """Whether samples in one row would see each other, in the model or in the teacher."""

    @property
    def origin(self) -> str:
        """What the model was loaded from, to be known again."""
        if self.source is None:
            return ""
        path = self.source.path
        return self.source.given if path is None else str(path.resolve())


def heal_spec(given: Any, own: Recipe | None, changes: Mapping[str, Any]) -> Heal:
    """Return the options of a healing.

    Args:
        given: a `heal` section, or a recipe that has one, in any of its forms; None for neither.
        own: the checkpoint's recipe, which counts where nothing is given.
        changes: keys that take the place of the section's.

    Raises:
        RecipeError: if a key or value is not allowed.

    Example:
        >>> heal_spec({"heal": {"tokens": 9, "train": "all"}}, None, {"train": "blocks"}).train
        'blocks'
    """
    if isinstance(given, Heal):
        base = given
    else:
        recipe = own if given is None else Recipe.of(given)
        base = (recipe.heal if recipe else None) or Heal()
    changes = dict(changes)
    if "epochs" in changes:
        changes.setdefault("tokens", None)  # which would take its place
    merged = {**base.model_dump(mode="json", exclude_unset=True), **changes}
    spec = Recipe.of({"heal": merged}).heal
    return spec or Heal()


def without_paths(spec: Heal) -> Heal:
    """Return options to publish: folders and files of this machine by their last name only."""

    def short(name: str) -> str:
        return Path(name).name if Path(name).exists() else name

    def shortened(data: str | HealSource) -> str | HealSource:
        if isinstance(data, str):
            return short(data)
        return data.model_copy(update={"data": short(data.data)})

    sources = spec.data if isinstance(spec.data, tuple) else (spec.data,)
    data: Any = tuple(map(shortened, sources))
    changes: dict[str, Any] = {"data": data if isinstance(spec.data, tuple) else data[0]}
    if spec.teacher is not None:
        changes["teacher"] = short(spec.teacher)
    return spec.model_copy(update=changes)


def prepare(
    model: PreTrainedModel | str | Path,
    *,
    recipe: Any,
    data: Any,
    teacher: PreTrainedModel | str | Path | None,
    changes: Mapping[str, Any],
    tokenizer: Any,
    progress: Progress,
) -> Ready:
    """Find, load and check everything.

    Args:
        model: a checkpoint or a model in memory.
        recipe: as for `heal_spec`.
        data: as the key `data`, or rows already made; None for what the options say.
        teacher: the dense model; None for what the options say.
        changes: as for `heal_spec`.
        tokenizer: of a model in memory; a checkpoint has its own.
        progress: told what is being done.

    Raises:
        HealingError: if there is no text to be had, or the teacher does not fit.
        SlimError: with what is wrong with model, recipe or data.
    """
    changes = dict(changes)
    rows = data if hasattr(data, "train") else None
    if data is not None and rows is None:
        changes["data"] = data if not isinstance(data, Path) else str(data)
    if isinstance(teacher, str | Path):
        changes["teacher"] = str(teacher)
    elif teacher is not None:
        changes["teacher"] = None  # takes the place of one that a recipe names
    if isinstance(model, str | Path):
        source = open_source(model)
        folder = SlimFolder() if source.path is None else read_slim_folder(source.path)
        spec = heal_spec(recipe, folder.recipe, changes)
        progress(0, 0, "reading the model")
        loaded = _load_finite(source)
        ready = Ready(loaded, spec, rows, load_tokenizer(source), None, source, folder)
    else:
        ready = Ready(model, heal_spec(recipe, None, changes), rows, tokenizer)
    spec = ready.spec
    if not isinstance(teacher, PreTrainedModel):
        teacher = None if spec.teacher is None else _teacher(spec.teacher, ready.tokenizer)
    # Asked before attention is chosen: some ways work on a GPU only.
    mixes = any(sees_neighbours(one) for one in (ready.model, teacher) if one is not None)
    if mixes:  # rows are taken apart one by one, so that none has to be as long as another
        spec = spec.model_copy(update={"micro_batch": 1})
    ready = replace(ready, spec=spec, teacher=teacher, mixes=mixes)
    _set_attention(ready.model, spec.attn_implementation)
    if teacher is not None:
        _set_attention(teacher, spec.attn_implementation)
    if rows is None:
        if ready.tokenizer is None:
            raise HealingError(
                f"{ready.origin or 'the model'}: has no tokenizer, so no text can be read. Put its "
                "tokenizer files beside the weights, or give rows already made."
            )
        rows = _rows(ready, progress)
    else:
        for part in (rows.train, rows.held_out):
            if isinstance(part, Rows):
                part.check_known(ready.tokenizer, embedding_rows(ready.model))
    return replace(ready, text=rows)


def _teacher(name: str, tokenizer: Any) -> Any:
    """Load the dense model.

    Raises:
        HealingError: if it has another vocabulary.
    """
    source = open_source(name)
    theirs = load_tokenizer(source)
    if tokenizer is not None and theirs is not None:
        ours_only = tokenizer.get_vocab().items() ^ theirs.get_vocab().items()
        if ours_only:
            raise HealingError(
                f"heal.teacher: {name}: {len(ours_only):,} entries of its vocabulary differ, such "
                f"as {min(ours_only)[0]!r}; teacher and model need the same. Give the model that "
                "this one was made from."
            )
    return _load_finite(source)


def _load_finite(source: Source) -> PreTrainedModel:
    """Load a model; with weights that are no numbers, no loss would be one."""
    model = load_model(source)
    check_finite(model.state_dict().items(), source.given, allow_nonfinite=None)
    return model


def _set_attention(model: Any, wanted: str) -> None:
    """Choose how attention is computed, in place.

    Raises:
        HealingError: if it cannot be computed so.
    """
    if wanted == "auto":
        flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
        if not (flash and getattr(model, "_supports_flash_attn", False)):
            return
        wanted = "flash_attention_2"
    try:
        with quiet():
            model.set_attn_implementation(wanted)
    except (ValueError, ImportError) as error:
        raise HealingError(
            f"heal.attn_implementation: {wanted}, which does not work here "
            f"({str(error).splitlines()[0]}). Take `auto`."
        ) from error


def _rows(ready: Ready, progress: Progress) -> Any:
    """Read the text; one process first, which fills the cache for the others."""
    usual = ready.spec.context_length
    length = min(usual, longest_input(ready.model) or usual)
    with processes().main_process_first():
        return healing_text(
            ready.spec,
            ready.tokenizer,
            teacher=ready.teacher,
            context_length=length,
            evenly=ready.mixes,
            model=ready.model,
            progress=progress,
        )
