"""What a walk through the decoder layers asks of whoever keeps them, and what it tells of each.

A fit needs one decoder layer at a time, and what stands before the first one only to begin with.
`Visits` is where a model that is not in memory brings each layer in, and takes up the finished one;
with a model in memory there is nothing to do.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from llmslim.errors import and_more


@dataclass
class Fitted:
    """What a fit did: to one layer, or to all."""

    errors: dict[str, float | None] = field(default_factory=dict)
    """Relative squared error of each site's output on held-out tokens, by name."""
    sites: set[str] = field(default_factory=set)
    """Names of the sites that were replaced."""
    notes: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    """Names of the sites that the calibration text never reached."""

    @property
    def told(self) -> list[str]:
        """The notes, and a sentence about what was not reached."""
        if not self.unseen:
            return self.notes
        said = f"{and_more(self.unseen)}: never called on the calibration text; init: project."
        return [*self.notes, said]

    def add(self, other: Fitted) -> None:
        """Add what was done to a further layer."""
        self.errors |= other.errors
        self.sites |= other.sites
        self.notes += other.notes
        self.unseen += other.unseen


class Streams(NamedTuple):
    """Hidden states by window, (1, L, D) each, at least float32; those to fit on come first."""

    dense: list[Tensor]
    """The dense model's."""
    slim: list[Tensor]
    """Those of the model as far as it is slim already."""


class Visits:
    """The visits that a walk makes; as they are here, to a model in memory."""

    def beginning(self) -> AbstractContextManager[None]:
        """Lend what runs before the decoder layers, and the first of these."""
        return nullcontext()

    def go_on(self, streams: Streams) -> tuple[int, Streams]:
        """Return the layer to begin with, and the streams before it.

        Args:
            streams: before the first layer.
        """
        return 0, streams

    def layer(self, _index: int) -> AbstractContextManager[None]:
        """Lend a decoder layer with its dense weights."""
        return nullcontext()

    def finished(self, _index: int, _fitted: Fitted, streams: Streams) -> Streams:
        """Take up a lent layer that is as it will be; its modules are the model's own.

        Args:
            streams: after it.

        Returns:
            The same values, wherever they are kept.
        """
        return streams
