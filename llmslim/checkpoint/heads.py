"""Refuse a model that predicts no tokens: one without an output head, or with a head of its own.

Loaded as a language model, the one lacks a weight and the other would lose what it was trained
for. What its config says of itself is told, since a missing `lm_head.weight` sounds like a broken
download.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoModel

from llmslim.errors import CheckpointError
from llmslim.modeling.base_class import auto_classes, listed_classes

from .safetensors_io import read_weights

_OTHER_HEAD = re.compile(
    r"For\w*(Classification|Answering|MultipleChoice|SentencePrediction|Reward\w*|Regression"
    r"|Retrieval|Detection|Segmentation)$"
)

_READ_PICKLES = {
    "Qwen2_5OmniForConditionalGeneration": (
        "spk_dict.pt",
        "Qwen2_5OmniThinkerForConditionalGeneration",
    )
}
"""Classes whose `from_pretrained` fails without a file that holds neither config nor weights: the
file, and the class of the part that needs none."""


def check_head(config: Any, folder: Path, given: str) -> None:
    """Refuse a config whose class is known to write no text, or to load a pickle.

    Args:
        config: the model's.
        folder: its files; weights need not be among them.
        given: the model, for messages.

    Raises:
        CheckpointError: if its class has no output head, or one for something else, or cannot be
            loaded without a pickle.
    """
    named = getattr(config, "architectures", None)
    kind = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if _OTHER_HEAD.search(kind):
        raise CheckpointError(
            f"{given}: is a {kind[:80]}, which scores text and writes none; a language model, such "
            "as a ...ForCausalLM, is needed. Give the model that it was trained from."
        )
    if kind in _READ_PICKLES:
        file, part = _READ_PICKLES[kind]
        raise CheckpointError(
            f"{given}: is a {kind}, which loads {file} beside its weights, a pickle; none are read "
            f"or written here. Give the part of it that writes text, saved as {part}."
        )
    if kind and kind in _base_classes(config) and not _has_head(config, folder):
        raise CheckpointError(
            f"{given}: is a {kind[:80]}, which has no output head; a language model, such as a "
            "...ForCausalLM, is needed. Give the whole model, saved with its head."
        )


def _base_classes(config: Any) -> set[str]:
    """Return the names of the classes without a head that a config's type has."""
    listed = AutoModel._model_mapping._model_mapping.get(config.model_type, ())
    # A few types list the class that writes text there, too.
    writing = {
        cls.__name__
        for auto in auto_classes(type(config)).values()
        for cls in listed_classes(auto, type(config))
    }
    return ({listed} if isinstance(listed, str) else set(listed)) - writing


def _has_head(config: Any, folder: Path) -> bool:
    """Return whether a head is stored all the same, or is the embedding."""
    text = config.get_text_config()
    if getattr(text, "tie_word_embeddings", False):
        return True
    try:
        entries = read_weights(folder)
    except CheckpointError:
        return False  # none are needed, or `open_source` has said so
    vocabulary = getattr(text, "vocab_size", None)
    return sum(vocabulary in entry.shape for entry in entries.values()) > 1
