"""The verb `convert`: check everything that can be checked, then choose the way.

Most models are converted piece by piece, see `streamed`. Here is the other way: load a model as a
whole, rewrite it, write it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from llmslim import editing, fitting, planning
from llmslim.anatomy.device import device_named
from llmslim.data import Windows
from llmslim.errors import CheckpointError, RecipeError
from llmslim.modeling.base_class import auto_class_name
from llmslim.options import ConvertOptions, takes
from llmslim.progress import Progress, quietly
from llmslim.recipe import Recipe
from llmslim.report.report import Report
from llmslim.storage import (
    NotInPiecesError,
    Pieces,
    check_finite,
    check_keeps_source,
    check_target,
    empty_model,
    explain_nonfinite,
    load_model,
    load_tokenizer,
    open_source,
    parse_size,
    type_notes,
    unused_notes,
    write_checkpoint,
)

from .calibrate import overflow_notes, read_text, texts_of, with_overrides
from .conversion_dir import ConversionDir, key_of
from .device import memory_of
from .drawn import check_drawn, convert_drawn
from .layer_store import check_layers
from .request import Conversion, Request
from .streamed import convert_streamed


@takes(ConvertOptions)
def convert(model: str | Path, options: ConvertOptions) -> Conversion:
    """Make a slim checkpoint from a model; keywords are the fields of `ConvertOptions`.

    A folder of safetensors is converted piece by piece: the largest decoder layer has to fit into
    the memory, not the model. What is done is kept in `.<name of out>.partial` until all is, so
    that an interrupted conversion can be continued. The whole model is in memory only to write
    calibration text, to be measured for `structure: auto`, and to be trained end to end. GGUF files
    and models whose code comes with them are converted in memory.

    A folder with a config and no weights is converted where `init` is `random` or another method
    that reads none: all weights of the result are then drawn, see `drawn`.

    Args:
        model: a hub id, a folder, a GGUF file, or a folder with a published kphi-3 checkpoint.
        options: how, see `ConvertOptions`.

    Raises:
        CheckpointError: if there is nothing that could be resumed, or it was begun differently.
        UnfinishedError: if the disk is full; what is done is kept for `resume`.
        SlimError: with every problem found; `out` is then as it was.
    """
    request = _request(model, options)
    source, recipe, target = request.source, request.recipe, request.target
    work = ConversionDir(target)
    published = work.published(key_of(request)) if options.resume and work.exists else None
    if published is not None:
        return Conversion(target, published, auto_class_name(source.config))
    check_target(target, options.overwrite)
    check_keeps_source(target, source.path, source.given)
    work.check(resume=options.resume, overwrite=options.overwrite)
    trusted = options.trust_remote_code
    notes: tuple[str, ...] = ()
    if not source.has_weights:
        reason = "a folder without weights"
    elif source.is_kphi3:
        reason = "a published kphi-3 checkpoint"
    else:
        # Everything that can be wrong with the recipe is found before gigabytes are read.
        empty = empty_model(source.config, source.given, trust_remote_code=trusted)
        plan = planning.plan(empty, recipe, model_name=source.name, init=request.options.init)
        try:
            if source.gguf_file is None and not any(site.also for site in plan.sites):
                pieces = _pieces(request, plan)
                unused = unused_notes(source, pieces.model, pieces.unused)
                with memory_of(request.device, work):
                    return convert_streamed(request, pieces, work, unused)
            reason = "a GGUF file" if source.gguf_file else "a model whose layers share weights"
        except NotInPiecesError as error:
            reason = f"a model that cannot be loaded in pieces ({error})"
            notes = (f"Converted in memory, as a whole: {error}.",)
        notes += unused_notes(source, empty)
    if options.resume:
        raise CheckpointError(
            f"{target}: nothing to resume; {reason} is converted in memory and starts over each "
            "time. Leave resume (--resume) out."
        )
    work.discard()  # checked above: there is nothing, or it may go
    with memory_of(request.device, work):
        return _convert_in_memory(request, notes) if source.has_weights else convert_drawn(request)


def _request(model: str | Path, options: ConvertOptions) -> Request:
    """Find the model and check the options; return the request for its conversion.

    Raises:
        RecipeError: if no recipe is given and the model is not slim already.
        CheckpointError: if the model has no weights, and none are to be drawn.
    """
    recipe = None if options.recipe is None else Recipe.of(options.recipe)
    shard_size = parse_size(options.max_shard_size)
    source = open_source(model, trust_remote_code=options.trust_remote_code, or_none=True)
    if not source.has_weights:
        check_drawn(source.given, options.init)
    if recipe is None:
        if not source.is_kphi3:
            raise RecipeError(
                f"{source.given}: no recipe given; only kphi-3 checkpoints are slim already. "
                "Name a recipe."
            )
        recipe = Recipe(name="kphi3", description="A published kphi-3 checkpoint, as it is.")
    texts = texts_of(options)
    _, init = with_overrides(recipe, options.init, texts, options.calibration_tokens)
    return Request(
        source,
        recipe,
        Path(options.out or f"{source.name}-{recipe.name}"),
        device_named(options.device),
        replace(options, init=init, calibration=texts, max_shard_size=shard_size),
        options.progress or quietly,
        options.adds_own_text,
        options.recorded(),
    )


def _pieces(request: Request, plan: editing.Plan) -> Pieces:
    """Return the pieces that a model can be loaded in.

    Raises:
        NotInPiecesError: if it cannot be converted that way.
    """
    fitted = plan.needs_calibration
    if fitting.steps_of(plan) and any(
        row.kind == "head" and row.action == "replaced" for row in plan.rows
    ):
        raise NotInPiecesError(
            "its head is replaced, and the training end to end needs the dense one"
        )
    pieces = Pieces(
        request.source,
        dtype=request.options.dtype,
        trust_remote_code=request.options.trust_remote_code,
        device=request.device if fitted else "cpu",
    )
    if fitted:
        check_layers(pieces)
    return pieces


def _convert_in_memory(request: Request, notes: tuple[str, ...]) -> Conversion:
    """Load, rewrite, write and read back; `notes` are for the report."""
    source, options, progress = request.source, request.options, request.progress
    trusted = options.trust_remote_code
    progress(0, 0, "reading the model")
    model = load_model(source, dtype=options.dtype, trust_remote_code=trusted)
    nonfinite = check_finite(
        model.state_dict().items(), source.given, allow_nonfinite=options.allow_nonfinite
    )
    plan = planning.plan(model, request.recipe, model_name=source.name, init=options.init)
    tokenizer = load_tokenizer(source, trust_remote_code=trusted)
    windows: Windows | None = None
    overflow: tuple[str, ...] = ()
    if plan.needs_calibration:
        model.to(request.device)  # type: ignore[arg-type]
        windows = read_text(request, tokenizer, model)
        overflow = () if nonfinite else overflow_notes(model, windows, source.given)
    steps = 0

    def fitting(done: int, total: int, what: str) -> None:
        nonlocal steps
        steps = total
        progress(done, total + 1, what)

    with explain_nonfinite(nonfinite):
        report, recipe = slim_with(
            model, plan, windows, seed=options.seed, init=options.init, progress=fitting
        )
    model.to("cpu")  # type: ignore[arg-type]
    written = type_notes(source, model.dtype, options.dtype)
    notes = (*nonfinite, *overflow, *(windows.notes if windows else ()), *written, *notes)
    report = request.record(replace(report, problems=(*report.problems, *notes)))
    progress(steps, steps + 1, "writing and reading back")
    write_checkpoint(
        model,
        request.target,
        **request.companions(model, tokenizer, report, recipe),
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    progress(steps + 1, steps + 1, "done")
    return Conversion(request.target, report, auto_class_name(source.config))


def slim_with(
    model: PreTrainedModel,
    plan: editing.Plan,
    windows: Windows | None,
    *,
    seed: int,
    init: str | None,
    progress: Progress | None,
) -> tuple[Report, Recipe]:
    """Carry out a plan on a model in memory, in place.

    Args:
        model: what to change.
        plan: of a recipe, for this model.
        windows: text to fit to, where the plan needs it.
        seed: seed of everything drawn.
        init: the method that the plan has in place of its recipe's.
        progress: called with how many blocks are done, how many there are, and what comes now.

    Returns:
        The ledger, and the recipe with the sizes that a budget comes to.
    """
    ids = None if windows is None else fitting.TokenWindows(windows.ids, windows.held_out)
    if ids is not None and plan.recipe.has_auto and plan.needs_calibration:
        recipe = fitting.allocate(model, plan.recipe, ids, init=init, progress=progress)
        plan = planning.plan(model, recipe, model_name=plan.model, init=init)
    report = fitting.rewrite(model, plan, seed=seed, calibration=ids, progress=progress)
    if windows is not None and plan.needs_calibration:
        report = replace(report, fitted_to=windows.description)
    return report, plan.recipe
