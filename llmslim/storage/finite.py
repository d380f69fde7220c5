"""Find weights that are not numbers: NaN and infinities.

One of them spreads to every logit, and a fit to it has no solution. A checkpoint that holds any
is damaged, or its training diverged; the user learns of it before an hour of work.

It looks at one tensor at a time, a piece of it at a time, so that it costs no memory: tensors may
be read from files meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite

import torch
from torch import Tensor

from llmslim.errors import CheckpointError, SlimError, and_more

_PIECE = 1 << 24
"""Elements looked at together."""
_SHOWN = 3


def nonfinite_tensors(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the tensors that hold NaN or infinities, each with how many.

    Args:
        tensors: names and tensors; those that are not floating-point are passed over, and a
            tensor that comes under a second name is looked at once.

    Example:
        >>> nonfinite_tensors([("a", torch.tensor([1.0, float("nan")]))])
        ['a (1 of 2)']
    """
    seen: set[tuple[int, int]] = set()
    found = []
    for name, tensor in tensors:
        place = (tensor.data_ptr(), tensor.numel())
        if not tensor.is_floating_point() or not tensor.numel() or place in seen:
            continue
        seen.add(place)
        pieces = tensor.detach().reshape(-1).split(_PIECE)
        # Extremes take one quick pass, and NaN is carried through them; counting is for the rare.
        wrong = sum(
            piece.numel() - int(torch.isfinite(piece).sum())
            for piece in pieces
            if not all(map(isfinite, map(float, torch.aminmax(piece))))
        )
        if wrong:
            found.append(f"{name} ({wrong:,} of {tensor.numel():,})")
    return found


def nonfinite_notes(
    found: Sequence[str], where: str, *, allow_nonfinite: bool | None = False
) -> tuple[str, ...]:
    """Return a note on weights that are not finite.

    Args:
        found: what `nonfinite_tensors` returned.
        where: the model, for the message.
        allow_nonfinite: whether they are reported only; None where they never can be.

    Returns:
        A sentence for the report, where there are any and they are allowed; else nothing.

    Raises:
        CheckpointError: if there are any and they are not allowed.
    """
    if not found:
        return ()
    sentence = (
        f"{where}: {len(found)} {'tensor holds' if len(found) == 1 else 'tensors hold'} "
        f"NaN or infinities: {and_more(found, _SHOWN)}"
    )
    if not allow_nonfinite:
        switch = ", or pass allow_nonfinite (--allow-nonfinite) to accept them"
        raise CheckpointError(
            f"{sentence}; weights must be finite. Download the model again"
            f"{'' if allow_nonfinite is None else switch}."
        )
    return (f"{sentence}.",)


def check_finite(
    tensors: Iterable[tuple[str, Tensor]], where: str, *, allow_nonfinite: bool | None = False
) -> tuple[str, ...]:
    """Look for NaN and infinities in weights; return a note.

    Args:
        tensors: as for `nonfinite_tensors`.
        where: as for `nonfinite_notes`.
        allow_nonfinite: as for `nonfinite_notes`.

    Raises:
        CheckpointError: if there are any and they are not allowed.
    """
    return nonfinite_notes(nonfinite_tensors(tensors), where, allow_nonfinite=allow_nonfinite)


@contextmanager
def explain_nonfinite(nonfinite: tuple[str, ...]) -> Iterator[None]:
    """Name weights that are not finite as the reason where a fit to them fails.

    Args:
        nonfinite: what `nonfinite_notes` returned.

    Raises:
        CheckpointError: in place of linear algebra's own error.
        RuntimeError: as it was, where all weights are finite.
        ValueError: the same.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not nonfinite or isinstance(error, SlimError):
            raise
        raise CheckpointError(
            f"{nonfinite[0]} Blocks cannot be fitted to them ({error}). Keep these modules as "
            "they are (`keep: true`), or draw the blocks (`init: random`)."
        ) from error
