"""Check that a checkpoint loads as the model that was written, and computes what that computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmslim.errors import CheckpointError

from .pieces import NotInPiecesError, Pieces
from .source import open_source

_TOKENS = 6
_CLOSE, _CLOSE_NARROW = 1e-4, 5e-2
"""Standard deviations of the logits that the order of sums may account for: where memory lies
otherwise they may be added up otherwise. The second one is for types narrower than float32."""


def check_loads(
    folder: Path, tensors: Mapping[str, Tensor], kind: str, device: torch.device
) -> Pieces:
    """Hold the headers of a checkpoint against the model that its config describes.

    Nothing is read but headers: this is for a checkpoint whose bytes were compared already.

    Args:
        folder: the checkpoint.
        tensors: names, shapes and types of every tensor that the model is to have.
        kind: name of its class.
        device: where its pieces will be.

    Returns:
        Its pieces.

    Raises:
        CheckpointError: if it does not load as that model.
    """
    try:
        source = open_source(folder)
        dtype = str(source.config.dtype).removeprefix("torch.")
        pieces = Pieces(source, dtype=dtype, device=device, tried=False)
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
    return pieces


@torch.no_grad()
def check_same_logits(made: PreTrainedModel, again: PreTrainedModel, where: str) -> None:
    """Run a model and what was loaded of it on a few tokens.

    Both hold the same bytes by now: this is about what is not stored, but worked out when a model
    is built.

    Args:
        made: the model that was written.
        again: the one that was loaded; moved to the device of the other.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: if what they give differs by more than the order of sums accounts for.
    """
    vocabulary = made.get_input_embeddings().num_embeddings
    ids = torch.arange(_TOKENS, device=made.device)[None] % int(vocabulary)  # type: ignore[arg-type]
    modes = [(module, module.training) for module in made.modules()]
    try:
        wanted = _logits(made.eval(), ids)
    except Exception:  # it needs more than text, and its bytes and code are compared
        return
    finally:
        for module, training in modes:
            module.training = training
    found = _logits(again.to(made.device).eval(), ids)  # type: ignore[arg-type]
    finite = wanted.isfinite()
    size = float(wanted[finite].std()) if int(finite.sum()) > 1 else 1.0
    close = _CLOSE * size if wanted.dtype == torch.float32 else _CLOSE_NARROW * size
    same = torch.equal(finite, found.isfinite())
    far = float((wanted - found)[finite].abs().max()) if same and bool(finite.any()) else 0.0
    if not same or far > close:
        raise CheckpointError(
            f"{where}: what was written computes something else than what was made (logits differ "
            f"by {far / size:.2g} standard deviations). This is a fault of llmslim; leave out "
            "depth, width or the rules of the recipe until it is gone."
        )


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits
