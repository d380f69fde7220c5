"""What a healing did: numbers only; reports, cards and pictures are views of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What the model says to one prompt, before and after."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class HealReport:
    """What a healing did."""

    path: Path | None
    """The checkpoint's folder; None where the model was healed in memory."""
    objective: str
    """What was made smaller; `layers, logits` where one came first."""
    train: str
    """What was trained: blocks, all or lora."""
    steps: int
    """Steps of the optimiser that the result stands on."""
    tokens: int
    """Tokens trained on, padding not counted."""
    padding: float
    """Share of padding in the packed rows, from 0 to 1."""
    tokens_per_second: float
    """While training; measuring and saving not counted."""
    trained_parameters: int
    loss_before: float | None
    """Mean of -log p(next token) on held-out text, in nats; None where there is no such text."""
    loss_after: float | None
    """Of the weights as they are stored."""
    loss_unrounded: float | None
    """Before they were rounded to the type they are stored in; None where nothing was rounded."""
    loss_teacher: float | None
    """The dense model's on the same text, where it was there."""
    history: tuple[Mapping[str, Any], ...]
    """A line per step (`loss`, …) and per measurement (`held_out_loss`), in order."""
    answers: tuple[Answer, ...]
    """To a few fixed prompts."""
    source: str
    """Where the text comes from."""
    licence: str
    """The text's licence."""
    settings: Mapping[str, Any]
    """The `heal` section as it was used."""
    notes: tuple[str, ...]
    """What a reader must know, one sentence each."""

    @property
    def gap_closed(self) -> float | None:
        """Share of the loss over the teacher's that is gone; None where that is not known."""
        if self.loss_before is None or self.loss_after is None or self.loss_teacher is None:
            return None
        gap = self.loss_before - self.loss_teacher
        return (self.loss_before - self.loss_after) / gap if gap > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, without the history, which has a file of its own."""
        data = asdict(self)
        del data["path"], data["history"]
        return {**data, "gap_closed": self.gap_closed}
