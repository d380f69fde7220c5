"""Check that a checkpoint loads, without loading it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from llmslim.errors import CheckpointError

from .pieces import NotInPiecesError, Pieces
from .source import open_source


def check_loads(folder: Path, tensors: Mapping[str, Tensor], kind: str) -> None:
    """Hold the headers of a checkpoint against the model that its config describes.

    Nothing is read but headers: this is for a checkpoint whose bytes were compared already.

    Args:
        folder: the checkpoint.
        tensors: names, shapes and types of every tensor that the model is to have.
        kind: name of its class.

    Raises:
        CheckpointError: if it does not load as that model.
    """
    try:
        source = open_source(folder)
        pieces = Pieces(source, dtype=str(source.config.dtype).removeprefix("torch."))
    except (CheckpointError, NotInPiecesError) as error:
        raise CheckpointError(
            f"{folder.name}: what was written does not load ({error})."
        ) from error
    if type(pieces.model).__name__ != kind:
        raise CheckpointError(
            f"{folder.name}: written as {kind}, loads as {type(pieces.model).__name__}; "
            "only language models that transformers' Auto classes find can be written."
        )
    loaded = pieces.model.state_dict()
    different = sorted({*pieces.unused, *(tensors.keys() ^ loaded.keys())}) or [
        name
        for name, tensor in tensors.items()
        if (tensor.shape, tensor.dtype) != (loaded[name].shape, loaded[name].dtype)
    ]
    if different:
        raise CheckpointError(
            f"{folder.name}: {len(different)} tensors load back differently, such as "
            f"{different[0]}; all weights of a checkpoint must be of one type and untied from "
            "each other, or tied as its config says."
        )
