"""How many steps a healing takes, in which arithmetic, and with how much memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from llmslim.anatomy.precision import bf16_is_fast
from llmslim.compat import use_one_gpu
from llmslim.healing.distributed import processes
from llmslim.healing.inputs import HealInputs
from llmslim.healing.memory import Memory, healing_memory
from llmslim.healing.packing_check import packing_notes
from llmslim.healing.trainable import make_trainable
from llmslim.recipe import Heal
from llmslim.storage.source import first_line

EVALUATIONS = 10
"""Held-out measurements of a healing, unless the recipe sets the steps between them."""


@dataclass(frozen=True)
class StepPlan:
    """How many steps a healing takes, and of what."""

    steps: int
    accumulate: int
    """Passes of one step in each process."""
    every: int
    """Steps between measurements."""
    rows: int
    """Rows to train on; a row of several passes counts once for each."""
    tokens: int
    """Tokens in these rows without padding; exact for whole passes."""
    notes: tuple[str, ...]

    @classmethod
    def of(cls, spec: Heal, text: Any, processes: int) -> StepPlan:
        """Plan the steps for some text and number of processes, all steps with as many rows."""
        together = spec.micro_batch * processes
        rows = math.ceil(spec.batch_size / together) * together
        notes = []
        if rows != spec.batch_size:
            notes.append(
                f"heal.batch_size: {spec.batch_size} rows do not divide by {processes} processes "
                f"with {spec.micro_batch} each; {rows} rows were used."
            )
        there = len(text.train)
        if spec.tokens is None:
            wanted = math.ceil(round(spec.epochs * there, 6))  # 0.1 * 30 is a little over 3
        else:
            wanted = math.ceil(spec.tokens * there / text.train.tokens)
        # The last step of a pass takes the rows that are left; no step has rows of two passes.
        passes, rest = divmod(wanted, there)
        last = math.ceil(rest / rows)
        steps = passes * math.ceil(there / rows) + last
        if spec.tokens is not None:
            rest = min(there, last * rows)  # whole steps
        every = spec.evaluate_every or math.ceil(steps / EVALUATIONS)
        seen = passes * there + rest
        tokens = round(seen * text.train.tokens / there)
        return cls(steps, rows // together, every, seen, tokens, tuple(notes))


def rate_share(step: int, spec: Heal, steps: int) -> float:
    """Return a step's share of the peak learning rate, which is never 0.

    Args:
        step: counted from 0.
        spec: `warmup` and `schedule`.
        steps: number of steps.

    Example:
        >>> [round(rate_share(step, Heal(warmup=0.25), 8), 3) for step in range(8)]
        [0.333, 0.667, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067]
    """
    rising = min(math.ceil(spec.warmup * steps), steps - 1)  # a single step is at the peak
    if step < rising:
        return (step + 1) / (rising + 1)
    if spec.schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2


def uses_bf16(spec: Heal, device: torch.device) -> bool:
    """Return whether to compute in bfloat16."""
    return spec.precision == "bf16" or (spec.precision == "auto" and bf16_is_fast(device))


def training_arguments(
    spec: Heal, plan: StepPlan, folder: Path, *, evaluates: bool
) -> TrainingArguments:
    """Return the options of the Trainer.

    Args:
        spec: the options.
        plan: of the steps.
        folder: where checkpoints go.
        evaluates: whether there are held-out rows.
    """
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=spec.micro_batch,
        gradient_accumulation_steps=plan.accumulate,
        learning_rate=spec.learning_rate,
        max_grad_norm=spec.max_grad_norm,
        # The Trainer also seeds numpy, which takes 32 bits.
        seed=spec.seed % 2**32,
        data_seed=spec.seed % 2**32,
        logging_strategy="no",
        eval_strategy="steps" if evaluates else "no",
        eval_steps=plan.every,
        save_strategy="steps",
        save_steps=plan.every,
        save_total_limit=2,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        ddp_find_unused_parameters=False,
        log_level="error",
        log_level_replica="error",
    )
    # With several GPUs and one process the Trainer would use DataParallel.
    use_one_gpu(arguments)
    return arguments


@dataclass(frozen=True)
class HealingPlan:
    """What a healing would do."""

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
    """On one device; None where it could not be computed."""
    notes: tuple[str, ...]

    def facts(self) -> list[tuple[str, str]]:
        """Return names and values for people, memory last."""
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


def plan_healing(inputs: HealInputs) -> HealingPlan:
    """Work out what a healing would do.

    Args:
        inputs: of the healing. The model is prepared for training; do not use it afterwards.

    Raises:
        HealingError: if it could not be done.
    """
    spec, text, model = inputs.spec, inputs.text, inputs.model
    objective, state = inputs.objective(), processes()
    plan = StepPlan.of(spec, text, state.num_processes)
    trainable = make_trainable(model, spec, inputs.narrowed)
    bf16 = uses_bf16(spec, state.device)
    notes = [*text.notes, *plan.notes, *packing_notes(mixes=inputs.mixes)]
    memory = None
    try:
        memory = healing_memory(
            model,
            spec,
            length=len(text.train[0]["input_ids"]),
            accumulate=plan.accumulate,
            bf16=bf16,
            device=state.device,
            teacher=inputs.teacher,
        )
    except Exception as error:  # models raise anything
        notes.append(f"The memory that it takes could not be computed ({first_line(error)}).")
    return HealingPlan(
        objective=objective.name,
        train=spec.train,
        trained_parameters=trainable.count(),
        parameters=sum(weight.numel() for weight in model.parameters()),
        steps=plan.steps,
        tokens=plan.tokens,
        held_out_rows=len(text.held_out),
        arithmetic="bf16" if bf16 else "fp32",
        source=text.source,
        licence=text.licence,
        memory=memory,
        notes=tuple(notes),
    )
