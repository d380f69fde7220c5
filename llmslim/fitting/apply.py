"""Carry out a plan on a model in memory: drop layers, resize MLPs, put blocks in place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from llmslim.editing.blocks import fill_site, seed_of
from llmslim.editing.finalise import finalise
from llmslim.editing.plans import Plan
from llmslim.editing.resize import resize_mlp
from llmslim.errors import DataError
from llmslim.fitting.calibration import TokenWindows
from llmslim.fitting.cost import fit_for_training
from llmslim.fitting.end_to_end import train_end_to_end
from llmslim.fitting.layer_store import Fitted
from llmslim.fitting.layerwise import fit_sequentially
from llmslim.progress import Progress, quietly
from llmslim.recipe import EndToEnd
from llmslim.report.report import Report


def rewrite(
    model: Any,
    plan: Plan,
    *,
    seed: int = 0,
    calibration: TokenWindows | None = None,
    progress: Progress | None = None,
) -> Report:
    """Carry out `plan` on `model`, in place.

    A model that keeps its base class's shape stays of that class; any other becomes the slim
    subclass of it, so that `save_pretrained` writes a checkpoint that loads back.

    Args:
        model: the model the plan was made for.
        plan: what to do.
        seed: seed of random blocks; every site draws from its own stream.
        calibration: token ids for methods that need them; with them, every block inside a decoder
            layer is fitted to the inputs it will really see.
        progress: called for every site.

    Returns:
        The ledger, with the error of every fitted block.

    Raises:
        SlimError: if the model is not the one the plan was made for.
        DataError: if a method needs calibration and there is none.
    """
    _check_text(plan, calibration)
    plan, recompute = fit_for_training(plan, model.device, loaded=True)
    finished = _counted(plan, progress or quietly)
    for mlp in plan.mlps:
        if not mlp.fitted:
            resize_mlp(model, mlp.mlp, mlp.width)
    seed_with = partial(seed_of, seed=seed)
    fitted = Fitted()
    if calibration is not None and plan.needs_calibration:
        ids = calibration.windows, calibration.held_out
        fitted = fit_sequentially(model, plan, *ids, seed_of=seed_with, progress=finished)
    errors = dict(fitted.errors)
    notes = [*plan.notes, *fitted.all_notes]
    head = model.get_output_embeddings()
    for site in plan.sites:
        if site.name not in fitted.sites:
            errors[site.name] = fill_site(model, site, seed_with)
            finished(site.name)
    finalise(model, plan)
    if fitted.states is not None and (spec := _end_to_end(plan)) is not None:
        trained = train_end_to_end(
            model,
            plan,
            spec,
            fitted.states,
            head=head,
            seed=seed,
            recompute=recompute,
            progress=finished,
        )
        notes.append(trained.note)
    return filled_in(plan, errors, notes)


def _check_text(plan: Plan, calibration: TokenWindows | None) -> None:
    """Refuse a fit to text without text.

    Raises:
        DataError: if a method needs it.
    """
    if plan.needs_calibration and calibration is None:
        raise DataError(
            f"{plan.recipe.where('init')}: least_squares fits to activations; it needs calibration "
            "text. Pass --calibration (`calibration=` in Python), or use init: project."
        )


def _counted(plan: Plan, progress: Progress) -> Callable[[str], None]:
    """Return a function that reports the next step of a plan, given its name."""
    total = len(plan.sites) + sum(mlp.fitted for mlp in plan.mlps) + steps_of(plan)
    numbers = itertools.count(1)
    return lambda what: progress(next(numbers), total, what)


def steps_of(plan: Plan) -> int:
    """Return how many steps the training end to end of a plan takes, 0 where there is none."""
    spec = _end_to_end(plan)
    return 0 if spec is None else spec.steps


def _end_to_end(plan: Plan) -> EndToEnd | None:
    refine = plan.recipe.refine
    return refine.end_to_end if refine is not None and plan.needs_calibration else None


def filled_in(plan: Plan, errors: Mapping[str, float | None], notes: Iterable[str]) -> Report:
    """Return the ledger of a plan that was carried out, with the errors of its blocks."""
    rows = [replace(row, init_error=errors.get(row.name)) for row in plan.rows]
    return replace(plan.report(), rows=tuple(rows), problems=tuple(notes))
