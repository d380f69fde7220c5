"""The result and the history of a healing, as numbers; cards and pictures are views of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmslim.errors import CheckpointError
from llmslim.report import healed
from llmslim.report.page.brief import facts_table, facts_text
from llmslim.report.read import read_report


@dataclass(frozen=True)
class Answer:
    """The model's answer to one prompt, before and after."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class HealReport:
    """The result of a healing."""

    path: Path | None
    """The checkpoint's folder; None where the model was healed in memory."""
    objective: str
    """Name of the loss that was trained on."""
    train: str
    """What was trained: blocks, all or lora."""
    steps: int
    """Steps of the optimiser up to the weights of the result."""
    tokens: int
    """Tokens trained on, padding not counted."""
    padding: float
    """Share of padding in the packed rows, from 0 to 1."""
    tokens_per_second: float
    """While training, without the time for measuring and saving."""
    trained_parameters: int
    loss_before: float | None
    """Mean of -log p(next token) on held-out text, in nats; None where there is no such text."""
    loss_after: float | None
    """The same for the weights as they are stored."""
    loss_unrounded: float | None
    """The same before rounding to the stored type; None where nothing was rounded."""
    loss_teacher: float | None
    """The dense model's on the same text; None without a teacher."""
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
    """Notes that a reader must see, one sentence each."""

    @property
    def gap_closed(self) -> float | None:
        """Share of the distance to the teacher's loss that was recovered; None where unknown."""
        if self.loss_before is None or self.loss_after is None or self.loss_teacher is None:
            return None
        gap = self.loss_before - self.loss_teacher
        return (self.loss_before - self.loss_after) / gap if gap > 0 else None

    def __repr__(self) -> str:
        return facts_text(self._title, self._facts)

    def _repr_html_(self) -> str:
        return facts_table(self._title, self._facts)

    def show(self) -> Path:
        """Open the checkpoint's page in the browser; return the temporary file with it.

        Raises:
            CheckpointError: if the model was healed in memory, where it has no page.
        """
        if self.path is None:
            raise CheckpointError(
                "healed in memory: a page is made of the files of a checkpoint. Give heal a folder "
                "to write (out)."
            )
        return read_report(self.path).show()

    @property
    def _title(self) -> str:
        return f"healed: {self.path}" if self.path else "healed in memory"

    @property
    def _facts(self) -> list[tuple[str, str]]:
        """What tells how it went, in nine lines at most; `healed.facts` has the rest."""
        brief = ("objective", "trained", "steps", "tokens", "held-out", "gap")
        found = healed.facts(self.to_dict())
        return [fact for fact in found if fact[0].startswith(brief)][:9]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values without the history, which has its own file."""
        data = asdict(self)
        del data["path"], data["history"]
        return {**data, "gap_closed": self.gap_closed}


@dataclass(frozen=True)
class Losses:
    """Of a result on held-out text; None where there is no such text."""

    before: float | None
    """Before the first step."""
    stored: float | None
    """As it is stored."""
    unrounded: float | None
    """Before rounding; None where nothing was rounded."""
    types: tuple[str, ...]
    """Names of the types that it was rounded to."""


def result_notes(losses: Losses, *, best: int, last: int, planned: int) -> list[str]:
    """Return sentences about what came of a healing.

    Args:
        losses: on held-out text.
        best: step whose weights are the result.
        last: step that was trained last.
        planned: how many steps there were to be.
    """
    notes, before, after = [], losses.before, losses.stored
    if after is not None and losses.unrounded is not None:
        notes.append(
            f"Rounding the trained weights to {', '.join(losses.types)}, the type they are stored "
            f"in, changed the held-out loss from {losses.unrounded:.4f} to {after:.4f}."
        )
    if before is None or after is None:
        notes.append("No text was held out: whether the model got better was not measured.")
    elif after >= before:
        notes.append(
            f"Healing did not lower the held-out loss ({before:.3f} before, {after:.3f} after). "
            "Try a lower learning_rate, or more text."
        )
    if last < planned:
        notes.append(
            f"Stopped early, after {last} of {planned} steps: the held-out loss no longer fell."
        )
    if best < last:
        notes.append(f"The weights are those of step {best}, the best measured.")
    return notes


def history_text(lines: Iterable[Mapping[str, Any]]) -> str:
    """Return a history as JSONL."""
    return "".join(json.dumps(dict(line)) + "\n" for line in lines)


def held_out_losses(history: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the held-out losses of a history, in order."""
    return [line["held_out_loss"] for line in history if "held_out_loss" in line]


def best_step(history: Sequence[Mapping[str, Any]]) -> int:
    """Return the step with the lowest held-out loss; the first of equal ones, as the Trainer."""
    measured = [line for line in history if "held_out_loss" in line]
    return int(min(measured, key=lambda line: line["held_out_loss"])["step"])


def tokens_seen(history: Sequence[Mapping[str, Any]], step: float = math.inf) -> int:
    """Return how many tokens were trained on, up to a step or in all."""
    lines = (line for line in history if "tokens" in line and line["step"] <= step)
    return max((int(line["tokens"]) for line in lines), default=0)


def should_stop(history: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Return whether the last `patience` measurements brought nothing better; None never does."""
    losses = held_out_losses(history)
    if patience is None or len(losses) <= patience:
        return False
    return min(losses[-patience:]) >= min(losses[:-patience])
