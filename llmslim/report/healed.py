"""The result of a healing for the model card and the command line, and a picture of its losses."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from typing import Any

from llmslim.errors import printable

CROSS_ENTROPY = "cross_entropy"
"""The objective whose loss is that of held-out text, too."""
_HONEST = """\
A healed model is still smaller than its base model, whose benchmark results do not apply to it.
Evaluate it on your own task.
"""


def facts(healing: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the facts of a healing for people, as names and values.

    Args:
        healing: `HealReport.to_dict` of it.
    """
    rows = [
        ("objective", healing["objective"]),
        ("trained", f"{healing['train']}, {healing['trained_parameters']:,} parameters"),
        ("steps", f"{healing['steps']:,}"),
        ("tokens", f"{healing['tokens']:,}"),
        ("padding", f"{100 * healing['padding']:.1f} %"),
        ("tokens per second", f"{healing['tokens_per_second']:,.1f}"),
    ]
    for key, name in (
        ("loss_before", "held-out loss before"),
        ("loss_after", "held-out loss after"),
        ("loss_unrounded", "held-out loss before rounding"),
        ("loss_teacher", "held-out loss, dense model"),
    ):
        if healing.get(key) is not None:
            rows.append((name, f"{healing[key]:.4f}"))
    if healing["gap_closed"] is not None:
        rows.append(("gap to the dense model closed", f"{100 * healing['gap_closed']:.1f} %"))
    rows += [("text", healing["source"]), ("licence", healing["licence"])]
    return [(name, printable(str(value))) for name, value in rows]


def section(healing: Mapping[str, Any], *, losses: str | None = None) -> str:
    """Return the section of a model card.

    Args:
        healing: `HealReport.to_dict` of it.
        losses: file name of the picture of its losses beside the card, if any.
    """
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts(healing))
    parts = [
        "## Healing\n",
        "This model was trained after the change. Held-out losses are the mean of "
        "-log p(next token), in nats, on text that it was not trained on.\n",
        f"| what | value |\n| --- | --- |\n{table}\n",
    ]
    if losses:
        parts.append(f"![Losses, step by step]({losses})\n")
    notes = [f"- {printable(note)}" for note in healing["notes"]]
    if notes:
        parts.append("\n".join(notes) + "\n")
    parts += [
        f"**{printable(answer['prompt'])}**\n\n"
        f"- before: {_cell(answer['before'])}\n- after: {_cell(answer['after'])}\n"
        for answer in healing["answers"]
    ]
    return "\n".join([*parts, _HONEST])


def _cell(text: str) -> str:
    """Return text on one line that cannot end a cell or start markup."""
    line = printable(" ".join(text.split()))
    for char in "\\`*_|<>[]":
        line = line.replace(char, f"\\{char}")
    return line or "(nothing)"


def curves(
    history: Sequence[Mapping[str, Any]], before: float | None
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return the losses of a healing over its steps: of training, and on held-out text.

    Args:
        history: lines with `step` and `loss`, and with `step` and `held_out_loss`.
        before: the held-out loss before the first step.
    """
    trained, held_out = (
        [(float(line["step"]), float(line[key])) for line in history if key in line]
        for key in ("loss", "held_out_loss")
    )
    return trained, [*([] if before is None else [(0.0, before)]), *held_out]


def picture(
    history: Sequence[Mapping[str, Any]],
    *,
    before: float | None = None,
    teacher: float | None = None,
    objective: str = CROSS_ENTROPY,
) -> bytes | None:
    """Return a picture of the losses as PNG; None where matplotlib is not installed.

    Args:
        history: as of `curves`.
        before: as there.
        teacher: the dense model's held-out loss.
        objective: what was trained on: where it is not what held-out text is measured by, training
            has an axis of its own.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    trained, measured = curves(history, before)
    if trained:
        own = axes if objective == CROSS_ENTROPY else axes.twinx()
        own.plot(*zip(*trained, strict=True), label="training", linewidth=1, alpha=0.7)
        own.set_ylabel(f"loss of the training: {objective}")
    if measured:
        steps, losses = zip(*measured, strict=True)
        axes.plot(steps, losses, label="held-out, in nats", marker="o", color="black")
    if teacher is not None:
        axes.axhline(teacher, label="held-out, dense model", linestyle="--", color="gray")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
