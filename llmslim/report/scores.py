"""What an evaluation finds, with confidence intervals, and the file that keeps it.

A mean over windows of text is shown with its 95 % confidence interval: mean ± t s / √n, s being the
standard deviation over the n windows and t Student's quantile for n - 1. Windows of one document
are alike, so the interval is a lower bound of what another text would give.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmslim.atomic import write_whole
from llmslim.report.kept import read_kept
from llmslim.storage import EVALUATION

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and the bounds of its confidence interval; None where there is one window only."""

    mean: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Return the mean of some values.

        Args:
            values: of windows, one at least.

        Example:
            >>> Estimate.of([1.0, 2.0, 3.0]).map(lambda value: round(value, 3))
            Estimate(mean=2.0, low=-0.484, high=4.484)
        """
        count = len(values)
        mean = math.fsum(values) / count
        if count == 1:
            return cls(mean)
        from scipy.stats import t as student  # takes a second, which readers need not wait

        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        half = float(student.ppf((1 + _CONFIDENCE) / 2, count - 1)) * math.sqrt(variance / count)
        return cls(mean, mean - half, mean + half)

    def map(self, function: Callable[[float], float]) -> Estimate:
        """Return the estimate of an increasing function of the mean."""
        low, high = (None if x is None else function(x) for x in (self.low, self.high))
        return Estimate(function(self.mean), low, high)


@dataclass(frozen=True)
class TextScores:
    """Scores of a model on one text."""

    text: str
    """Name of the file or data set."""
    windows: int
    length: int
    """Tokens of a window."""
    loss: Estimate
    """Mean of -log p(next token), in nats."""
    dense_loss: Estimate | None = None
    """The dense model's."""
    divergence: Estimate | None = None
    """KL(dense || model) of a token, in nats."""
    agreement: Estimate | None = None
    """Share of tokens after which both models find the same token likeliest."""

    @property
    def perplexity(self) -> Estimate:
        """Exponential of the loss."""
        return self.loss.map(math.exp)

    @property
    def dense_perplexity(self) -> Estimate | None:
        """Exponential of the dense model's loss."""
        return None if self.dense_loss is None else self.dense_loss.map(math.exp)


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task of lm-evaluation-harness."""

    task: str
    metric: str
    value: float
    stderr: float | None = None
    rows: int | None = None
    """How many rows were tried."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that is known of how good a model is."""

    model: str
    """Its folder's name or id on the hub."""
    against: str = ""
    """The dense model that it was compared with, if any."""
    texts: tuple[TextScores, ...] = ()
    tasks: tuple[TaskScore, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    """Of the libraries that the figures depend on."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain types, for JSON."""
        return asdict(self)

    def merged(self, newer: Evaluation) -> Evaluation:
        """Return it with what a newer one of the same model has in place of the same scores."""
        texts = {(one.text, one.windows, one.length): one for one in (*self.texts, *newer.texts)}
        tasks = {(one.task, one.metric): one for one in (*self.tasks, *newer.tasks)}
        return Evaluation(
            newer.model,
            newer.against or self.against,
            tuple(texts.values()),
            tuple(tasks.values()),
            self.versions | newer.versions,
        )


def read_evaluation(folder: Path) -> Evaluation | None:
    """Return what is kept in a checkpoint's folder, None where nothing is.

    Raises:
        CheckpointError: if it is something else.
    """
    found: Evaluation | None = read_kept(folder / EVALUATION, Evaluation, "llmslim eval")
    return found


def keep_evaluation(folder: Path, found: Evaluation) -> Evaluation:
    """Add scores to what is kept in a checkpoint's folder; return all of them."""
    before = read_evaluation(folder)
    whole = found if before is None else before.merged(found)
    write_whole(folder / EVALUATION, json.dumps(whole.to_dict(), indent=2) + "\n")
    return whole
