"""Interface between the layer-wise fit and the place where decoder layers are stored.

A fit needs one decoder layer at a time, and what runs before the first one only at its beginning.
A `LayerStore` loads each layer and takes the finished one; with a model in memory there is nothing
to do.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from llmslim.errors import and_more


@dataclass(frozen=True)
class DenseStates:
    """What the dense model makes of the calibration windows, before its last norm."""

    ids: list[Tensor]
    """Token ids of each batch, (N, L)."""
    hidden: list[Tensor]
    """The dense stream after the last decoder layer, (N, L, D)."""
    fitting: int
    """How many of the batches are to fit on; the others are held out."""
    autocast: torch.dtype | None
    """Type of products; None for the model's own."""


@dataclass
class Fitted:
    """Results of a fit, of one layer or of all."""

    errors: dict[str, float | None] = field(default_factory=dict)
    """Relative squared error of each site's output on held-out tokens, by name."""
    sites: set[str] = field(default_factory=set)
    """Names of the sites that were replaced."""
    notes: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    """Names of the sites that the calibration text never reached."""
    states: DenseStates | None = None
    """Of a fit of all layers, what a training end to end starts from."""

    @property
    def all_notes(self) -> list[str]:
        """The notes, and a sentence about what was not reached."""
        if not self.unseen:
            return self.notes
        unseen = f"{and_more(self.unseen)}: never called on the calibration text; init: project."
        return [*self.notes, unseen]

    def add(self, other: Fitted) -> None:
        """Add the results of a further layer."""
        self.errors |= other.errors
        self.sites |= other.sites
        self.notes += other.notes
        self.unseen += other.unseen


class Streams(NamedTuple):
    """Hidden states by window, (N, L, D) each, at least float32; those to fit on come first.

    N is 1 on a processor; on a GPU several windows make a batch.
    """

    dense: list[Tensor]
    """Of the dense model; it may have further windows at its end."""
    slim: list[Tensor]
    """Of the model with what has been replaced so far."""


class LayerStore:
    """Where decoder layers are stored; this one is a model in memory."""

    def beginning(self) -> AbstractContextManager[None]:
        """Hold what runs before the decoder layers, and the first of these, in memory."""
        return nullcontext()

    def resume(self, streams: Streams) -> tuple[int, Streams]:
        """Return the first layer that is still to be fitted, and the streams before it.

        Args:
            streams: before the first layer of all.
        """
        return 0, streams

    def layer(self, _index: int) -> AbstractContextManager[None]:
        """Hold a decoder layer with its dense weights in memory."""
        return nullcontext()

    def finished(self, _index: int, _fitted: Fitted, streams: Streams) -> Streams:
        """Store a layer that is as it will be; its modules are the model's own.

        Args:
            streams: after it.

        Returns:
            The same values, wherever they are kept.
        """
        return streams
