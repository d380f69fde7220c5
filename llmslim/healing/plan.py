"""What a healing would do, and what it needs, before anything is trained: `heal --dry-run`."""

from __future__ import annotations

from dataclasses import dataclass

from llmslim.checkpoint.source import first_line
from llmslim.healing.memory import Memory, healing_memory
from llmslim.healing.phases import checked_phases
from llmslim.healing.inputs import Ready
from llmslim.healing.processes import processes
from llmslim.healing.sizes import Sizes, packing_notes, uses_bf16
from llmslim.healing.trainable import make_trainable


@dataclass(frozen=True)
class HealingPlan:
    """What would be done."""

    objective: str
    train: str
    trained_parameters: int
    parameters: int
    steps: int
    tokens: int
    """Tokens to train on, padding not counted."""
    held_out_rows: int
    arithmetic: str
    source: str
    licence: str
    memory: Memory | None
    """On one device; None where it is not known."""
    notes: tuple[str, ...]

    def facts(self) -> list[tuple[str, str]]:
        """Return it as names and values, memory last."""
        rows = [
            ("objective", self.objective),
            (
                "trained",
                f"{self.train}, {self.trained_parameters:,} of {self.parameters:,} parameters",
            ),
            ("steps", f"{self.steps:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("held-out rows", f"{self.held_out_rows:,}"),
            ("text", self.source),
            ("licence of the text", self.licence),
            ("arithmetic", self.arithmetic),
        ]
        if self.memory is not None:
            rows += [(f"memory: {name}", size) for name, size in self.memory.facts()]
        return rows


def plan_healing(ready: Ready) -> HealingPlan:
    """Work out what a healing would do.

    Args:
        ready: what `prepare` found; its model is made ready for training and of no use after.

    Raises:
        HealingError: if it could not be done.
    """
    spec, text, model = ready.spec, ready.text, ready.model
    chosen = checked_phases(model, text, spec, ready.teacher)
    state = processes()
    run = Sizes.of(spec, text, state.num_processes)
    trained = make_trainable(model, spec, ready.folder.narrowed(model))
    bf16 = uses_bf16(spec, state.device)
    notes = [*text.notes, *run.notes, *packing_notes(mixes=ready.mixes)]
    memory = None
    try:
        memory = healing_memory(
            model,
            spec,
            length=len(text.train[0]["input_ids"]),
            accumulate=run.accumulate,
            bf16=bf16,
            teacher=ready.teacher,
        )
    except Exception as error:  # in as many classes as there are models
        notes.append(f"How much memory it takes is not known here ({first_line(error)}).")
    return HealingPlan(
        objective=", ".join(one.name for one, _ in chosen),
        train=spec.train,
        trained_parameters=trained.count(),
        parameters=sum(weight.numel() for weight in model.parameters()),
        steps=run.steps,
        tokens=run.tokens,
        held_out_rows=len(text.held_out),
        arithmetic="bf16" if bf16 else "fp32",
        source=text.source,
        licence=text.licence,
        memory=memory,
        notes=tuple(notes),
    )
