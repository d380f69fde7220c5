"""What happens between the steps of a healing: history, progress, and when to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, cast

from transformers import TrainerCallback

from llmslim.healing.objectives import Objective
from llmslim.recipe import Heal

Progress = Callable[[int, int, str], None]


class Watch(TrainerCallback):
    """Writes the history, shows progress, stops early.

    Args:
        trainer: what it watches.
        progress: told of every step.
    """

    def __init__(self, trainer: Any, progress: Progress) -> None:
        self.trainer, self.progress = trainer, progress
        self.seconds, self.tokens, self.seen, self.began = 0.0, 0, 0, 0.0
        self.rates: dict[bool, float] = {}

    @property
    def tokens_per_second(self) -> float:
        """While training; measuring and saving not counted."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Measure the model as it is; count on from where training goes on."""
        self.seen = tokens_seen(self.trainer.work.history)
        if self.trainer.begin is not None:
            self.trainer.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Start the clock."""
        self.began = time.perf_counter()
        self.trainer.step_loss = 0.0
        groups = cast(Any, self.trainer.optimizer).param_groups
        self.rates = {group["changed"]: group["lr"] for group in groups}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Note the step, and tell of it."""
        trainer = self.trainer
        self.seconds += time.perf_counter() - self.began
        self.tokens += trainer.step_tokens
        self.seen += trainer.step_tokens
        step = state.global_step
        entry = {
            "step": step,
            "objective": next((o.name for o, end in trainer.phases if step <= end), ""),
            "loss": trainer.step_loss,
            "grad_norm": trainer.grad_norm,
            "learning_rate": self.rates.get(False, self.rates.get(True)),
            "tokens": self.seen,
            "tokens_per_second": round(self.tokens_per_second, 1),
        }
        if trainer.spec.block_learning_rate is not None and True in self.rates:
            entry["block_learning_rate"] = self.rates[True]
        trainer.work.note(entry, write=args.should_save)
        measured = held_out(trainer.work.history)
        shown = f", held-out {measured[-1]:.3f}" if measured else ""
        self.progress(
            step,
            state.max_steps,
            f"loss {trainer.step_loss:.3f}{shown}, {self.tokens_per_second:,.0f} tokens/s",
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Stop where the held-out loss falls no more."""
        if should_stop(self.trainer.work.history, self.trainer.spec, self.trainer.phases):
            control.should_training_stop = True


def held_out(history: list[dict[str, Any]]) -> list[float]:
    """Return the held-out losses of a history, in order."""
    return [line["held_out_loss"] for line in history if "held_out_loss" in line]


def tokens_seen(history: list[dict[str, Any]], step: float = math.inf) -> int:
    """Return how many tokens were trained on, up to a step or in all."""
    lines = (line for line in history if "tokens" in line and line["step"] <= step)
    return max((int(line["tokens"]) for line in lines), default=0)


def should_stop(
    history: list[dict[str, Any]], spec: Heal, phases: list[tuple[Objective, int]]
) -> bool:
    """Return whether the last `patience` measurements brought nothing better.

    Only the last phase counts: matching layers may well raise the loss on text for a while.
    """
    begin = phases[-2][1] if len(phases) > 1 else 0
    losses = held_out([line for line in history if line["step"] > begin])
    if spec.patience is None or len(losses) <= spec.patience:
        return False
    return min(losses[-spec.patience :]) >= min(losses[: -spec.patience])
