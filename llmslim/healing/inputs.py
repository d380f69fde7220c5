"""Find, load and check everything that a healing needs, before any training."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmslim.anatomy.sites import find_layers
from llmslim.compat import supports_flash_attention
from llmslim.data import Rows, embedding_rows, healing_text, longest_input
from llmslim.errors import HealingError
from llmslim.healing.distributed import processes
from llmslim.healing.objectives import Objective, objective_named
from llmslim.healing.packing_check import sees_neighbours
from llmslim.options import HealOptions, without_folder
from llmslim.planning.depth import kept_layers
from llmslim.progress import Progress
from llmslim.recipe import Heal, HealSource, Recipe
from llmslim.report.read import ReportFile, read_report
from llmslim.storage import (
    REPORT,
    Source,
    check_finite,
    load_model,
    load_tokenizer,
    open_source,
    quiet,
)

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class SlimFolder:
    """Files of a checkpoint beside its weights; None where llmslim did not write it."""

    recipe: Recipe | None = None
    report: ReportFile | None = None

    @classmethod
    def read(cls, folder: Path) -> SlimFolder:
        """Read recipe and report of a checkpoint; missing ones are None.

        Args:
            folder: the checkpoint.

        Raises:
            CheckpointError: if a file cannot be read.
            RecipeError: if the recipe is wrong.
        """
        recipe = folder / "recipe.yaml"
        return cls(
            Recipe.load(recipe) if recipe.is_file() else None,
            read_report(folder) if (folder / REPORT).is_file() else None,
        )

    def kept_layers(self) -> tuple[int, ...]:
        """Return which layers of the source model are left; empty where that is unknown.

        Raises:
            RecipeError: if recipe and report do not match.
        """
        if self.recipe is None or self.report is None:
            return ()
        found = (_LAYER.search(row.name) for row in self.report.report.rows)
        count = 1 + max((int(match[1]) for match in found if match), default=-1)
        return kept_layers(self.recipe, count) if count else ()

    def narrowed(self, model: Any) -> tuple[str, ...]:
        """Return the names, in this model, of dense maps whose size the recipe changed.

        Args:
            model: loaded from this checkpoint.
        """
        if self.report is None:
            return ()
        stack = find_layers(model).path
        now = {before: after for after, before in enumerate(self.kept_layers())}
        names = []
        for row in self.report.report.rows:
            if row.action == "dropped" or row.params_before == row.params_after:
                continue
            match = re.match(rf"{re.escape(stack)}\.(\d+)\.", row.name)
            if match and row.kind == "projection" and int(match[1]) in now:
                names.append(f"{stack}.{now[int(match[1])]}.{row.name[match.end() :]}")
        return tuple(names)


@dataclass(frozen=True)
class HealInputs:
    """A model to heal, and what healing uses."""

    model: Any
    spec: Heal
    text: Any
    """Rows to train on and held-out rows, as `llmslim.data.healing_text` returns them."""
    tokenizer: Any = None
    """For the answers before and after; without it there are none."""
    teacher: Any = None
    """The dense model."""
    narrowed: tuple[str, ...] = ()
    """Names of dense maps that the recipe made narrower."""
    mixes: bool = False
    """Whether samples in one row would see each other, in the model or the teacher."""
    source: Source | None = None
    """The checkpoint; None for a model in memory."""
    folder: SlimFolder = field(default_factory=SlimFolder)

    @property
    def data_names(self) -> tuple[str, ...]:
        """What was given to train on, by name."""
        data = self.spec.data
        each = data if isinstance(data, tuple) else (data,)
        return tuple(one.data if isinstance(one, HealSource) else one for one in each)

    def objective(self) -> Objective:
        """Return the objective, after checking it with the teacher and the text.

        Raises:
            HealingError: if objective, teacher and text do not fit together.
        """
        spec, teacher = self.spec, self.teacher
        objective = objective_named(
            spec.objective or ("cross_entropy" if teacher is None else "logits")
        )
        if spec.store_teacher and teacher is None:
            raise HealingError(
                "heal.store_teacher: true without a teacher. Name one (--teacher), or leave "
                "store_teacher out."
            )
        if spec.store_teacher and objective.name != "logits":
            raise HealingError(
                f"heal.store_teacher: true with {objective.name}; only the teacher's logits are "
                "stored, for objective `logits`. Leave store_teacher out, or use `logits`."
            )
        if objective.needs_teacher and teacher is None:
            raise HealingError(
                f"heal.objective: {objective.name} without a teacher, from which it learns. Name "
                "the dense model (--teacher), or use cross_entropy."
            )
        if teacher is not None:
            ours, theirs = (
                m.get_output_embeddings().weight.shape[0] for m in (self.model, teacher)
            )
            if ours != theirs:
                raise HealingError(
                    f"heal.teacher: a vocabulary of {theirs:,} tokens, but the model's has "
                    f"{ours:,}; they must be equal. Give the model that this one was made from."
                )
        if len(self.text.train) == 0:
            raise HealingError("heal.data: no text to train on; at least one row is needed.")
        return objective


def heal_spec(given: Any, own: Recipe | None, changes: Mapping[str, Any]) -> Heal:
    """Return the options of a healing.

    Args:
        given: a `heal` section, or a recipe with one, in any form; None for the checkpoint's.
        own: the checkpoint's recipe.
        changes: keys that replace the section's.

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
        changes.setdefault("tokens", None)  # which has precedence
    merged = {**base.model_dump(mode="json", exclude_unset=True), **changes}
    return Recipe.of({"heal": merged}).heal or Heal()


def without_paths(spec: Heal) -> Heal:
    """Return options to publish: of absolute paths only the last part."""

    def shortened(data: Any) -> Any:
        if isinstance(data, tuple):
            return tuple(map(shortened, data))
        if isinstance(data, HealSource):
            return data.model_copy(update={"data": without_folder(data.data)})
        return without_folder(data)

    teacher = spec.teacher and without_folder(spec.teacher)
    return spec.model_copy(update={"data": shortened(spec.data), "teacher": teacher})


def load_inputs(
    model: PreTrainedModel | str | Path, options: HealOptions, progress: Progress
) -> HealInputs:
    """Find, load and check everything.

    Args:
        model: a checkpoint or a model in memory.
        options: as for `llmslim.heal`.
        progress: called before each part.

    Raises:
        HealingError: if there is no text, or the teacher does not fit the model.
        SlimError: if model, recipe or data are wrong.
    """
    source, folder, tokenizer = None, SlimFolder(), options.tokenizer
    if isinstance(model, str | Path):
        source = open_source(model)
        folder = SlimFolder() if source.path is None else SlimFolder.read(source.path)
    spec = heal_spec(options.recipe, folder.recipe, options.changes())
    if source is not None:
        progress(0, 0, "reading the model")
        model, tokenizer = _load_finite(source), load_tokenizer(source)
    teacher = options.teacher
    if not isinstance(teacher, PreTrainedModel):
        teacher = None if spec.teacher is None else _load_teacher(spec.teacher, tokenizer)
    both = [one for one in (model, teacher) if one is not None]
    # Before attention is chosen: some implementations need a GPU.
    mixes = any(map(sees_neighbours, both))
    if mixes:  # one row per sample; in batches of one, which need no padding
        spec = spec.model_copy(update={"micro_batch": 1})
    for one in both:
        _set_attention(one, spec.attn_implementation)
    rows = options.data if hasattr(options.data, "train") else None
    narrowed = folder.narrowed(model)
    inputs = HealInputs(model, spec, rows, tokenizer, teacher, narrowed, mixes, source, folder)
    if rows is None:
        return replace(inputs, text=_read_text(inputs, progress))
    for part in (rows.train, rows.held_out):
        if isinstance(part, Rows):
            part.check_known(tokenizer, embedding_rows(model))
    return inputs


def _load_teacher(name: str, tokenizer: Any) -> Any:
    """Load the dense model.

    Raises:
        HealingError: if it has another vocabulary.
    """
    source = open_source(name)
    theirs = load_tokenizer(source)
    if tokenizer is not None and theirs is not None:
        different = tokenizer.get_vocab().items() ^ theirs.get_vocab().items()
        if different:
            raise HealingError(
                f"heal.teacher: {name}: {len(different):,} entries of its vocabulary differ, such "
                f"as {min(different)[0]!r}; teacher and model must have the same. Give the model "
                "that this one was made from."
            )
    return _load_finite(source)


def _load_finite(source: Source) -> PreTrainedModel:
    """Load a model and refuse weights that are not finite, with which no loss would be."""
    model = load_model(source)
    check_finite(model.state_dict().items(), source.given, allow_nonfinite=None)
    return model


def _set_attention(model: Any, wanted: str) -> None:
    """Choose the implementation of attention, in place.

    Raises:
        HealingError: if it does not work here.
    """
    if wanted == "auto":
        flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
        if not (flash and supports_flash_attention(model)):
            return
        wanted = "flash_attention_2"
    try:
        with quiet():
            model.set_attn_implementation(wanted)
    except (ValueError, ImportError) as error:
        raise HealingError(
            f"heal.attn_implementation: {wanted}, which does not work here "
            f"({str(error).splitlines()[0]}). Use `auto`."
        ) from error


def _read_text(inputs: HealInputs, progress: Progress) -> Any:
    """Read the text; the main process first, to fill the cache for the others.

    Raises:
        HealingError: if there is no tokenizer.
    """
    if inputs.tokenizer is None:
        raise HealingError(
            f"{inputs.source.given if inputs.source else 'the model'}: has no tokenizer, which "
            "text needs. Put its tokenizer files beside the weights, or give rows."
        )
    usual = inputs.spec.context_length
    with processes().main_process_first():
        return healing_text(
            inputs.spec,
            inputs.tokenizer,
            teacher=inputs.teacher,
            context_length=min(usual, longest_input(inputs.model) or usual),
            evenly=inputs.mixes,
            model=inputs.model,
            progress=progress,
        )
