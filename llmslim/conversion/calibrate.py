"""Text to fit to, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmslim import surgery
from llmslim.checkpoint import NotInPiecesError, empty_model, load_tokenizer, open_source
from llmslim.data import Windows, calibration_windows, longest_input
from llmslim.recipe import Calibration, Recipe

from .options import Job


def check_text(job: Job, model: PreTrainedModel) -> None:
    """Refuse, for loading in pieces, calibration that runs the whole dense model.

    Args:
        job: a conversion that fits to text.
        model: on any device.

    Raises:
        NotInPiecesError: if it does.
    """
    if job.recipe.has_auto:
        raise NotInPiecesError("sharing out a budget measures the whole model")
    spec = calibration_spec(job.recipe, model, job.calibration, job.calibration_tokens)
    refine = job.recipe.refine
    if refine is not None and refine.logits_steps:
        raise NotInPiecesError("refining by what is predicted runs the whole model")
    if "self" in spec.texts:
        raise NotInPiecesError("the calibration text is sampled from the whole model")


def read_text(job: Job, tokenizer: Any, model: PreTrainedModel) -> Windows:
    """Return the windows of text that a conversion fits to.

    Args:
        job: the conversion.
        tokenizer: the model's.
        model: in memory, if the text is to be sampled from it.
    """
    spec = calibration_spec(job.recipe, model, job.calibration, job.calibration_tokens)
    return calibration_windows(spec, tokenizer, model, progress=job.tell)


def try_text(model: str, recipe: Recipe, *, trust_remote_code: bool = False) -> tuple[str, ...]:
    """Read the files of text that a conversion would fit to, as its dry run does.

    Args:
        model: what would be converted; none of its weights are read.
        recipe: says which text; what is no file here is not read, which is told.
        trust_remote_code: run model code that comes with the model.

    Returns:
        Sentences about the text.

    Raises:
        DataError: if the text cannot be used.
    """
    source = open_source(model, trust_remote_code=trust_remote_code, weights=False)
    empty = empty_model(source.config, source.given, trust_remote_code=trust_remote_code)
    spec = calibration_spec(recipe, empty, (), None)
    files = tuple(text for text in spec.texts if Path(text).expanduser().is_file())
    others = tuple(
        f"{text}: no file here; it was not read."
        for text in spec.texts
        if text not in {*files, "self"}
    )
    if not files:
        return others
    # Of several texts each gives as many tokens as all would.
    tokens = -(-spec.tokens // len(spec.texts)) * len(files)
    spec = spec.model_copy(update={"data": files, "tokens": tokens})
    return (*calibration_windows(spec, load_tokenizer(source), empty).notes, *others)


@torch.no_grad()
def told_of_overflow(
    model: PreTrainedModel, windows: Windows | None, given: str
) -> tuple[str, ...]:
    """Say so where a dense model overflows its own type: no recipe is to blame for that.

    Args:
        model: with weights that are finite.
        windows: text that it is fitted to, if any.
        given: the model, for the message.

    Returns:
        A sentence for the report, where a window of text shows it.
    """
    if windows is None or model.dtype != torch.float16:
        return ()
    try:
        logits = model(input_ids=windows.ids[:1].to(model.device), use_cache=False).logits
    except (RuntimeError, TypeError, ValueError):
        return ()  # what does not run on text alone is refused by the fit, with a reason
    return () if logits.isfinite().all() else (overflow_told(given, "predictions of text are"),)


def overflow_told(given: str, what: str) -> str:
    """Return the sentence about a model whose type is too narrow for it.

    Args:
        given: the model.
        what: what shows it, with its verb.
    """
    most = torch.finfo(torch.float16).max
    return (
        f"{given}: its own {what} not finite in float16, which holds numbers up to {most:,.0f}, "
        "whatever the recipe. Pass dtype (--dtype) bfloat16 or float32 for a model that computes."
    )


def token_ids(windows: Windows | None) -> surgery.Calibration | None:
    """Return what fitting needs of calibration windows."""
    return None if windows is None else surgery.Calibration(windows.ids, windows.held_out)


def calibration_spec(
    recipe: Recipe,
    model: PreTrainedModel,
    data: Sequence[str],
    tokens: int | None,
) -> Calibration:
    """Return the recipe's calibration section, with what the caller asked for instead.

    Args:
        recipe: may have a section `calibration`.
        model: whose longest sequence is a limit.
        data: texts in place of the section's, if any.
        tokens: how many of it.
    """
    asked, _ = asked_for(recipe, None, data, tokens)
    given = asked.calibration or Calibration()
    if "sequence_length" not in given.model_fields_set:
        # Windows as long as the model reads, where that is less than the usual length.
        usual = given.sequence_length
        length = min(usual, longest_input(model) or usual)
        given = given.model_copy(update={"sequence_length": length})
    return given


def asked_for(
    recipe: Recipe, init: str | None, data: Sequence[str], tokens: int | None
) -> tuple[Recipe, str | None]:
    """Return a recipe and a method with what the caller asked for in their place.

    Args:
        recipe: may have a section `calibration`.
        init: the method asked for; where there is none, asking for text asks for a fit to it.
        data: texts in place of the section's, if any.
        tokens: how many of it.
    """
    changes: dict[str, Any] = {"data": tuple(data) or None, "tokens": tokens}
    changes = {key: value for key, value in changes.items() if value is not None}
    if not changes:
        return recipe, init
    section = (recipe.calibration or Calibration()).model_copy(update=changes)
    return recipe.model_copy(update={"calibration": section}), init or "least_squares"
