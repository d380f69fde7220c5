"""Text to fit to, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmslim.data import Windows, calibration_windows, longest_input
from llmslim.errors import DataError
from llmslim.options import ConvertOptions
from llmslim.recipe import Calibration, Recipe
from llmslim.storage import empty_model, load_tokenizer, open_source

from .request import Request
from .whole_model import WholeModel


def read_text(
    request: Request, tokenizer: Any, model: PreTrainedModel, whole: WholeModel | None = None
) -> Windows:
    """Return the windows of text that a conversion fits to.

    Args:
        request: the conversion.
        tokenizer: the model's.
        model: in memory, or without weights.
        whole: brings it into memory, if it is not there and the text is to be sampled from it.
    """
    spec = _spec(request, model)
    given = tuple(text for text in spec.texts if text != "self")

    def read(spec: Calibration) -> Windows:
        writer = model if whole is None or "self" not in spec.texts else whole.model
        return calibration_windows(spec, tokenizer, writer, progress=request.progress)

    if not given or not request.adds_own_text:
        return read(spec)
    # The model's own text was added by default: that is no reason to stop.
    why = "the model is too large for the memory"
    if whole is None or whole.fits:
        try:
            return read(spec)
        except DataError as error:
            why = str(error)
    windows = read(spec.model_copy(update={"data": given}))
    return replace(windows, notes=(*windows.notes, f"No text of the model's own was added: {why}"))


def _spec(request: Request, model: PreTrainedModel) -> Calibration:
    options = request.options
    return calibration_spec(
        request.recipe, model, tuple(options.calibration or ()), options.calibration_tokens
    )


def try_text(model: str, recipe: Recipe, *, trust_remote_code: bool = False) -> tuple[str, ...]:
    """Read the files of text that a conversion would fit to, as its dry run does.

    Args:
        model: what would be converted; none of its weights are read.
        recipe: names the text; what is not a file here is not read, and a note states so.
        trust_remote_code: run model code that comes with the model.

    Returns:
        Sentences about the text.

    Raises:
        DataError: if the text cannot be used.
    """
    source = open_source(model, trust_remote_code=trust_remote_code, weights=False)
    empty = empty_model(source.config, source.given, trust_remote_code=trust_remote_code)
    spec = calibration_spec(recipe, empty)
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
def overflow_notes(model: PreTrainedModel, windows: Windows | None, given: str) -> tuple[str, ...]:
    """Return a note where a dense model overflows its type, whatever the recipe.

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
    return () if logits.isfinite().all() else (overflow_note(given, "predictions of text are"),)


def overflow_note(given: str, what: str) -> str:
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


def calibration_spec(
    recipe: Recipe,
    model: PreTrainedModel,
    data: Sequence[str] = (),
    tokens: int | None = None,
) -> Calibration:
    """Return the recipe's calibration section, with what the caller gave instead.

    Args:
        recipe: may have a section `calibration`.
        model: whose longest sequence is a limit.
        data: texts in place of the section's, if any.
        tokens: how many of it.
    """
    given = with_overrides(recipe, None, data, tokens)[0].calibration or Calibration()
    if "sequence_length" not in given.model_fields_set:
        # Windows as long as the model reads, where that is less than the usual length.
        usual = given.sequence_length
        length = min(usual, longest_input(model) or usual)
        given = given.model_copy(update={"sequence_length": length})
    return given


def texts_of(options: ConvertOptions) -> tuple[str, ...]:
    """Return the texts that take the place of the recipe's: those given, and the model's own."""
    texts = options.texts
    return (*texts, "self") if options.adds_own_text else texts


def with_overrides(
    recipe: Recipe, init: str | None, data: Sequence[str], tokens: int | None
) -> tuple[Recipe, str | None]:
    """Return a recipe and a method with what the caller gave in their place.

    Args:
        recipe: may have a section `calibration`.
        init: the caller's method; where there is none, a caller's text is to be fitted to.
        data: texts in place of the section's, if any.
        tokens: how many of it.

    Raises:
        DataError: if that is none.
    """
    if tokens is not None and tokens < 1:
        raise DataError(f"calibration_tokens: {tokens}; at least 1. Leave it out for the recipe's.")
    changes: dict[str, Any] = {"data": tuple(data) or None, "tokens": tokens}
    changes = {key: value for key, value in changes.items() if value is not None}
    if not changes:
        return recipe, init
    section = (recipe.calibration or Calibration()).model_copy(update=changes)
    return recipe.model_copy(update={"calibration": section}), init or "least_squares"
