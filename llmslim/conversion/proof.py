"""Check by computing that what is loaded is what was made, with one piece in memory at a time.

While a piece is in memory as it was made, its modules are run on fixed random inputs: a decoder
layer with the masks and rotary embeddings that its model passes to it, an embedding on token ids, a
norm or a head on hidden states. Of the output a fingerprint is kept: its length and its products
with a few vectors of random signs, which any difference changes. When all is written, the same is
done with the pieces that the new config and the files give, and the fingerprints are compared.

Left out: layers that cannot be run alone, because they hand each other more than hidden states.
Of these, code, settings and bytes are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.anatomy import first_difference
from llmslim.anatomy.layer_calls import Calls, record_calls, run_layer
from llmslim.anatomy.sites import Layers, find_layers
from llmslim.errors import CheckpointError, TargetError
from llmslim.storage import NotInPiecesError, Piece, Pieces

_TOKENS = 4
_DIRECTIONS = 4
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Part of a fingerprint by which two may differ: sums may be ordered differently where memory lies
otherwise. The narrow types have 2e-2."""


class PieceRunner:
    """Runs pieces of one model on fixed inputs.

    Args:
        pieces: the model.
    """

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._layers, self._calls = _calls(pieces)

    @torch.no_grad()
    def fingerprint(self, piece: Piece) -> list[float]:
        """Return a fingerprint of what a loaded piece computes; empty if it is not run."""
        model = self._pieces.model
        index = None if self._layers is None else self._layers.index_of(piece.name)
        found: list[float] = []
        if index is not None:
            if self._calls is None:
                return []
            layer = model.get_submodule(piece.name)
            if not _is_loaded(layer):
                return []
            hidden = _draw(self._calls.hidden[0].shape, layer)
            output, _ = run_layer(layer, hidden.float(), self._calls.extras[index][0])
            return [] if output is None else _fingerprint(output)
        for name in piece.modules:
            output = _alone(model.get_submodule(name))
            found += [] if output is None else _fingerprint(output)
        return found


def check_computes(written: Pieces, made: Any, fingerprints: Mapping[str, list[float]]) -> None:
    """Compare what a checkpoint computes, piece by piece, with what was made.

    Args:
        written: the checkpoint.
        made: the model that was made, on the meta device.
        fingerprints: of each piece as it was made, by its name in the new model.

    Raises:
        CheckpointError: if it computes something else.
    """
    if difference := first_difference(made, written.model):
        raise CheckpointError(_wrong(written, difference))
    runner = PieceRunner(written)
    close = _CLOSE.get(written.model.dtype, 2e-2)
    for piece in written.all:
        wanted = fingerprints.get(piece.name)
        written.load(piece)
        lacking = next((name for name, tensor in written.tensors(piece) if tensor.is_meta), None)
        if lacking is not None:
            raise CheckpointError(_wrong(written, f"{lacking} is not loaded"))
        found = runner.fingerprint(piece) if wanted else []
        written.release(piece)
        if wanted and not _agree(wanted, found, close):
            raise CheckpointError(_wrong(written, f"{piece.name} gives other numbers"))


def _wrong(written: Pieces, what: str) -> str:
    return (
        f"{written.source.name}: what was written computes something else than what was made "
        f"({what}). This is a fault of llmslim; leave these modules out of the recipe."
    )


def _calls(pieces: Pieces) -> tuple[Layers | None, Calls | None]:
    """Return the decoder layers and what their model calls them with, as far as that is known.

    That does not depend on weights: zeros will do. Only the first layer, which is run, has them in
    memory.
    """
    model: Any = pieces.model
    try:
        layers = find_layers(model)
    except TargetError:
        return None, None
    stack = list(model.get_submodule(layers.path))
    first = [piece for piece in pieces.all if layers.index_of(piece.name) in (None, 0)]
    try:
        pieces.make_tables()
        for piece in first:
            pieces.load_zeros(piece, in_memory=layers.index_of(piece.name) == 0)
        vocabulary = int(model.get_input_embeddings().num_embeddings)
        ids = torch.arange(_TOKENS, device=pieces.device)[None] % vocabulary
        return layers, record_calls(model, stack, [ids])
    except (NotInPiecesError, TargetError, AttributeError, NotImplementedError):
        return layers, None
    finally:
        for piece in first:
            pieces.release(piece)


def _alone(module: nn.Module) -> Tensor | None:
    """Run a module outside of the decoder layers, None where it takes something else."""
    weight = next(module.parameters(), None)
    if weight is None or weight.dim() not in (1, 2) or not _is_loaded(module):
        return None
    if hasattr(module, "num_embeddings"):
        given = torch.arange(_TOKENS, device=weight.device)[None] % int(module.num_embeddings)  # type: ignore[arg-type]
    else:
        size = int(getattr(module, "in_features", weight.shape[-1]))
        given = _draw(torch.Size((1, _TOKENS, size)), module)
    try:
        output = module(given)
    except Exception:  # a module of some architecture's own
        return None
    usable = isinstance(output, Tensor) and output.is_floating_point() and not output.is_meta
    return output if usable else None


def _is_loaded(module: nn.Module) -> bool:
    """Return whether all of a module is loaded; parts of it may be pieces of their own."""
    return not any(t.is_meta for t in (*module.parameters(), *module.buffers()))


def _draw(shape: torch.Size, module: nn.Module) -> Tensor:
    weight = next(module.parameters())
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(device=weight.device, dtype=weight.dtype)


def _fingerprint(output: Tensor) -> list[float]:
    """Return the length of an output and its products with vectors of random signs."""
    flat = output.detach().float().cpu().flatten()
    return [float(flat.norm()), *(_signs(len(flat)) @ flat).tolist()]


@lru_cache(maxsize=1)  # layer after layer is of one size
def _signs(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    signs = torch.randint(0, 2, (_DIRECTIONS, size), generator=generator, dtype=torch.int8)
    return signs.mul_(2).sub_(1).float()


def _agree(one: list[float], other: list[float], close: float) -> bool:
    if len(one) != len(other):
        return False
    size = max((abs(x) for x in one if math.isfinite(x)), default=0.0)
    return all(
        abs(x - y) <= close * size if math.isfinite(x) and math.isfinite(y) else repr(x) == repr(y)
        for x, y in zip(one, other, strict=True)
    )
