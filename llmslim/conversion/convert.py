"""The verb `convert`: check everything that can be checked, then choose the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmslim import surgery
from llmslim.checkpoint import (
    MAX_SHARD_SIZE,
    NotInPiecesError,
    Pieces,
    check_apart,
    check_target,
    empty_model,
    open_source,
    parse_size,
    told_of_unused,
)
from llmslim.errors import CheckpointError, RecipeError
from llmslim.modeling.base_class import auto_class_name
from llmslim.recipe import Recipe
from llmslim.surgery import Progress, quietly

from .calibrate import asked_for, check_text
from .device import device_named, memory_of
from .in_memory import convert_in_memory
from .options import Conversion, Job, RecipeLike
from .journal import key_of
from .layer_store import check_layers
from .streamed import convert_streamed
from .conversion_dir import Work


def convert(
    model: str | Path,
    recipe: RecipeLike | None = None,
    out: str | Path | None = None,
    *,
    init: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    calibration: str | Sequence[str] | None = None,
    calibration_tokens: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_nonfinite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Make a slim checkpoint from a model.

    A folder of safetensors is converted piece by piece: the largest decoder layer has to fit into
    the memory, not the model. What is done is kept in `.<name of out>.partial` until all is, so
    that an interrupted conversion can go on. GGUF files, models whose code comes with them, fits to
    text that the model itself writes or to what it predicts (`logits_steps`), and `structure: auto`
    are converted in memory.

    Args:
        model: a hub id, a folder, a GGUF file, or a folder with a published kphi-3 checkpoint.
        recipe: what to do; may be left out for a kphi-3 checkpoint, which is slim already.
        out: folder to write; `./<model>-<recipe>` by default. Must not exist.
        init: a method that takes the place of the recipe's.
        dtype: `float32`, `bfloat16` or `float16`; the source's own by default.
        seed: seed of everything drawn.
        calibration: text to fit to, in place of the recipe's: `self`, a file or a data set, or
            several of them. With it, a recipe that needs none is fitted by `least_squares`, unless
            `init` says otherwise.
        calibration_tokens: how many tokens of it, in all.
        device: where blocks are fitted to text, such as `cpu` or `cuda:1`; a GPU where there is
            one by default. What needs no text is done on the processor.
        trust_remote_code: run model code that comes with the model.
        allow_nonfinite: go on where weights of the model are NaN or infinite; the report then
            names them.
        max_shard_size: bytes in one file of weights, such as `5GB`; a larger model gets several
            and an index.
        resume: go on with a conversion to the same `out` that was interrupted.
        overwrite: replace `out` where it exists, once the new one is whole, and throw away an
            unfinished conversion to it, unless `resume` is given.
        progress: told how many steps are done, how many there are (0 while that is not known),
            and what comes now.

    Raises:
        RecipeError: if no recipe is given and the model is not slim already.
        CheckpointError: if there is nothing that could be resumed, or it was begun differently.
        UnfinishedError: if the disk is full; what is done is kept for `resume`.
        SlimError: with every problem found; `out` is then as it was.
    """
    chosen = None if recipe is None else Recipe.of(recipe)
    shard_size = parse_size(max_shard_size)
    source = open_source(model, trust_remote_code=trust_remote_code)
    if chosen is None:
        if not source.is_kphi3:
            raise RecipeError(
                f"{source.given}: no recipe given; only kphi-3 checkpoints are slim already. "
                "Name a recipe."
            )
        chosen = Recipe(name="kphi3", description="A published kphi-3 checkpoint, as it is.")
    texts = (calibration,) if isinstance(calibration, str) else tuple(calibration or ())
    _, init = asked_for(chosen, init, texts, calibration_tokens)
    target = Path(out) if out is not None else Path(f"{source.name}-{chosen.name}")
    job = Job(
        source=source,
        recipe=chosen,
        target=target,
        init=init,
        dtype=dtype,
        seed=seed,
        calibration=texts,
        calibration_tokens=calibration_tokens,
        device=device_named(device),
        trust_remote_code=trust_remote_code,
        allow_nonfinite=allow_nonfinite,
        max_shard_size=shard_size,
        resume=resume,
        overwrite=overwrite,
        tell=progress or quietly,
    )
    work = Work(target)
    published = work.published(key_of(job)) if resume and work.exists else None
    if published is not None:
        return Conversion(target, published, auto_class_name(source.config))
    check_target(target, overwrite)
    check_apart(target, source.path, source.given)
    work.check(resume=resume, overwrite=overwrite)
    reason = None
    notes: tuple[str, ...] = ()
    if source.is_kphi3:
        reason = "a published kphi-3 checkpoint"
    else:
        # Everything that can be wrong with the recipe is found before gigabytes are read.
        empty = empty_model(source.config, source.given, trust_remote_code=trust_remote_code)
        made = surgery.plan(empty, chosen, model_name=source.name, init=init)
        if source.gguf_file is not None:
            reason = "a GGUF file"
        elif any(site.also for site in made.sites):
            reason = "a model whose layers share weights"
    if reason is None:
        try:
            if made.needs_calibration:
                check_text(job, empty)
            pieces = Pieces(
                source,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                device=job.device if made.needs_calibration else "cpu",
            )
            if made.needs_calibration:
                check_layers(pieces)
        except NotInPiecesError as error:
            reason = f"a model that cannot be loaded in pieces ({error})"
            notes = (f"Converted in memory, as a whole: {error}.",)
        else:
            unused = told_of_unused(source, pieces.model, pieces.unused)
            with memory_of(job.device, work):
                return convert_streamed(job, pieces, work, unused)
    if resume:
        raise CheckpointError(
            f"{target}: nothing to resume; {reason} is converted in memory and begins anew each "
            "time. Leave resume (--resume) out."
        )
    work.discard()  # checked above: there is nothing, or it may go
    if not source.is_kphi3:
        notes = (*notes, *told_of_unused(source, empty))
    with memory_of(job.device, work):
        return convert_in_memory(job, notes)
