"""Text to fit to, as token ids."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from llmslim import surgery
from llmslim.data import Windows
from llmslim.recipe import Calibration, Recipe


def token_ids(windows: Windows | None) -> surgery.Calibration | None:
    """Return what fitting needs of calibration windows."""
    return None if windows is None else surgery.Calibration(windows.ids, windows.held_out)


def calibration_spec(
    recipe: Recipe, model: PreTrainedModel, data: str | None, tokens: int | None
) -> Calibration:
    """Return the recipe's calibration section, with what the caller asked for instead.

    Args:
        recipe: may have a section `calibration`.
        model: whose longest sequence is a limit.
        data: text in place of the section's.
        tokens: how many of it.
    """
    given = recipe.calibration or Calibration()
    if "sequence_length" not in given.model_fields_set:
        # Windows as long as the model reads, where that is less than the usual length.
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        usual = given.sequence_length
        given = given.model_copy(update={"sequence_length": min(usual, longest or usual)})
    changes: dict[str, Any] = {"data": data, "tokens": tokens}
    return given.model_copy(update={k: v for k, v in changes.items() if v is not None})
