"""What is known of how large and how good a model is, as rows that models can share.

Every row has the dense model's value and the slim one's, so that a report shows the rows of one
model and a comparison those of several beside each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llmslim.report import wording
from llmslim.report.read import ReportFile
from llmslim.report.scores import Estimate

HEALING_LOSS = "held-out loss of healing"


@dataclass(frozen=True)
class Measure:
    """One row: a quantity of the dense model and of the slim one."""

    name: str
    """What was measured, and on which text or task: rows of one name can be compared."""
    write: Callable[[float], str]
    value: Estimate
    """Of the model as it is."""
    dense: Estimate | None = None
    """Of the dense model; None where it was not measured."""
    before: Estimate | None = None
    """Of the slim model before it was healed, where that was measured with the same text."""
    kind: Literal["size", "quality", "speed"] = "quality"
    """What it says about the model."""
    more_is_better: bool = False
    loss: bool = False
    """Whether it is a loss in nats, which can be drawn over the size."""


def measures(found: ReportFile) -> list[Measure]:
    """Return all that is known of a model, sizes first."""
    return [*_sizes(found), *_healing(found), *_texts(found), *_tasks(found), *_speeds(found)]


def _sizes(found: ReportFile) -> list[Measure]:
    return [
        Measure(
            name,
            lambda value, write=write: write(round(value)),  # type: ignore[misc]
            Estimate(after),
            Estimate(before),
            kind="size",
        )
        for name, write, before, after in wording.totals_rows(found.report.totals)
    ]


def _healing(found: ReportFile) -> list[Measure]:
    done = found.healing or {}
    if done.get("loss_after") is None:
        return []
    before, after, dense = (
        None if done.get(key) is None else Estimate(done[key])
        for key in ("loss_before", "loss_after", "loss_teacher")
    )
    assert after is not None
    name = f"{HEALING_LOSS}, {done['source']}"
    return [Measure(name, "{:.4f}".format, after, dense, before, loss=True)]


def _texts(found: ReportFile) -> list[Measure]:
    rows = []
    for one in found.scores.texts if found.scores else ():
        where = f"{one.text} ({one.windows} x {one.length} tokens)"
        rows += [
            Measure(f"loss, {where}", "{:.4f}".format, one.loss, one.dense_loss, loss=True),
            Measure(f"perplexity, {where}", "{:.2f}".format, one.perplexity, one.dense_perplexity),
        ]
        if one.divergence is not None:
            name = f"KL from the dense model, {where}"
            rows.append(Measure(name, "{:.4f}".format, one.divergence))
        if one.agreement is not None:
            name = f"same top token, {where}"
            rows.append(Measure(name, _percent, one.agreement, more_is_better=True))
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _tasks(found: ReportFile) -> list[Measure]:
    return [
        Measure(
            f"{one.task}, {one.metric}",
            "{:.4f}".format,
            Estimate(one.value),
            more_is_better=not one.metric.endswith(("perplexity", "bits_per_byte")),
        )
        for one in (found.scores.tasks if found.scores else ())
    ]


def _speeds(found: ReportFile) -> list[Measure]:
    rows = []
    for one in found.benchmarks:
        dense = {speed.batch: Estimate(speed.decode) for speed in one.dense}
        rows += [
            Measure(
                f"decode tokens/s, batch {speed.batch} ({one.device}, {one.dtype})",
                "{:,.1f}".format,
                Estimate(speed.decode),
                dense.get(speed.batch),
                kind="speed",
                more_is_better=True,
            )
            for speed in one.speeds
        ]
    return rows
