"""One healing from beginning to end, or from where it was killed to the end.

Training itself is transformers' Trainer on accelerate; this file says what is measured before and
after, where it goes on, and what happens when something goes wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import safetensors
import torch
import transformers
from accelerate import PartialState
from torch import Tensor

from llmslim.checkpoint import model_digest, quiet, versions
from llmslim.data import collate, collate_apart, collate_flat
from llmslim.healing.answers import PROMPTS, answers
from llmslim.healing.packing_check import takes_position_ids
from llmslim.healing.rows import Filled, text_digest
from llmslim.healing.phases import checked_phases, paired_layers, uses_layers
from llmslim.healing.processes import is_sharded, process_notes, processes
from llmslim.healing.report import Answer, HealReport
from llmslim.healing.restoring import as_it_was, to_compute
from llmslim.healing.distributed import give_back, lend
from llmslim.healing.sizes import (
    Sizes,
    packing_notes,
    training_arguments,
    uses_bf16,
)
from llmslim.healing.stored import Numbered, numbered
from llmslim.healing.teacher_cache import ask_once, is_begun
from llmslim.healing.trainable import keep_activations, make_trainable
from llmslim.healing.trainer import HealingTrainer
from llmslim.healing.watch import Progress, should_stop, tokens_seen
from llmslim.healing.rundir import FORMAT, Work, explain_full_disk
from llmslim.recipe import Heal
from llmslim.surgery import quietly


@dataclass(frozen=True)
class Place:
    """Where a healing keeps what it needs to go on."""

    folder: Path
    resume: bool = False
    """Whether to go on with what is there; with nothing there, a healing begins."""
    overwrite: bool = False
    """Whether an unfinished healing that is there may be thrown away."""
    hold: bool = False
    """Whether to keep other processes out until `Work.release` or `Work.remove`."""


def heal_model(
    model: Any,
    text: Any,
    spec: Heal,
    *,
    place: Place,
    tokenizer: Any = None,
    teacher: Any = None,
    narrowed: Iterable[str] = (),
    teacher_layers: Sequence[int] | None = None,
    mixes: bool = False,
    progress: Progress | None = None,
) -> tuple[HealReport, Work]:
    """Train a model, in place.

    Where `accelerate launch` spreads it over processes, each has it whole again at the end.

    Args:
        model: a causal language model.
        text: rows to train on and rows held out, as `llmslim.data.healing` makes them.
        spec: the options.
        place: where to keep what is needed to go on after a kill.
        tokenizer: for answers before and after; none are asked without it.
        teacher: the dense model; left as it was. With `store_teacher` it is off the device while
            the model trains, and one that `spec.teacher` names leaves memory too: its parameters
            are then empty.
        narrowed: names of dense maps that surgery made narrower.
        teacher_layers: which of the teacher's layers each layer stands for; the same by default.
        mixes: whether samples in one row would see each other; each then gets a row of its own.
        progress: told of every step.

    Returns:
        What was done, without a path, and the working folder, which is the caller's to remove.

    Raises:
        HealingError: if it cannot be done, or the loss stops being a number; the last good state
            is then in the working folder, and the model is as it was at that moment, or without
            its weights if it was spread over processes.
    """
    tell = progress or quietly
    chosen = checked_phases(model, text, spec, teacher)
    state = processes()
    run = Sizes.of(spec, text, state.num_processes)
    phases = [(one, round(share * run.steps)) for one, share in chosen]
    bf16 = uses_bf16(spec, state.device)
    work = Work(place.folder)
    narrowed = list(narrowed)
    opened = held = False
    with (
        quiet(),
        as_it_was(model),
        # One that was loaded for this alone may go once it was asked.
        as_it_was(teacher, weights=spec.teacher is None),
    ):
        if teacher is not None:
            teacher.eval().requires_grad_(requires_grad=False)
        key = _key(model, text, teacher, spec, run, state, bf16=bf16)
        given, model = model, lend(model) if is_sharded(state) else model
        layers = paired_layers(model, teacher, teacher_layers) if uses_layers(phases) else ()
        trained = make_trainable(model, spec, narrowed)
        try:
            keep_activations(model, keep=not spec.gradient_checkpointing)
            measured = _open(work, place, key, state)
            opened = True
            trainer = HealingTrainer(
                spec,
                trained,
                phases,
                teacher=teacher,
                layers=layers,
                bf16=bf16,
                position_ids=takes_position_ids(model),
                work=work,
                run=run,
                progress=tell if state.is_main_process else quietly,
                args=training_arguments(spec, run, work.path, evaluates=len(text.held_out) > 0),
                train_dataset=Filled(
                    Numbered(text.train) if spec.store_teacher else text.train,
                    spec.micro_batch * state.num_processes if state.num_processes > 1 else 1,
                ),
                eval_dataset=text.held_out if len(text.held_out) else None,
                data_collator=numbered(_collator(model, mixes=mixes)),
            )
            if spec.store_teacher:
                ask_once(trainer, text.train, measured, state, tell)
            elif teacher is not None:
                to_compute(teacher, trainer.args.device, bf16=bf16)

            def begin() -> None:
                if "start" not in measured:
                    tell(0, run.steps, "measuring the model as it is")
                    measured["start"] = _measure(trainer, tokenizer, measured.get("teacher"))
                    if state.is_main_process:
                        work.save(measured)

            trainer.begin = begin
            result = _train(trainer, work, run, state)
            losses = _settled_losses(trainer)
            after = _answers(trainer, tokenizer)
            if trained.model is not given:
                give_back(trained.model, given)
                trained.model = given
            held = place.hold
        except Exception as error:
            if opened:  # else it is another's, or another healing's
                kept = work.last_checkpoint() is not None or is_begun(work.path)
                if state.is_main_process and not kept:
                    work.remove()  # there is nothing to go on with
                explain_full_disk(error, work.path, kept=kept)
            raise
        finally:
            if trained.model is given:
                trained.release()
            if not held:
                work.release()
    start = measured["start"]
    report = HealReport(
        path=None,
        objective=", ".join(one.name for one, end in phases if end > 0),
        train=spec.train,
        steps=result.steps,
        tokens=tokens_seen(work.history, result.steps),
        padding=text.padding,
        tokens_per_second=round(trainer.watch.tokens_per_second, 1),
        trained_parameters=result.trained_parameters,
        loss_before=start["loss"],
        loss_after=losses.stored,
        loss_unrounded=losses.unrounded,
        loss_teacher=start["teacher"],
        history=tuple(work.history),
        answers=tuple(
            Answer(prompt, before, later)
            for prompt, before, later in zip(PROMPTS, start["answers"], after, strict=False)
        ),
        source=text.source,
        licence=text.licence,
        settings=spec.model_dump(mode="json", exclude_none=True),
        notes=(
            *text.notes,
            *run.notes,
            *process_notes(state),
            *packing_notes(mixes=mixes),
            *_notes(start["loss"], losses, result, run),
        ),
    )
    return report, work


def _key(
    model: Any, text: Any, teacher: Any, spec: Heal, run: Sizes, state: PartialState, *, bf16: bool
) -> dict[str, Any]:
    """Return what the result of a healing depends on, part by part."""
    return {
        "the model": model_digest(model),
        "the text": text_digest(text),
        "the teacher": None if teacher is None else model_digest(teacher),
        **spec.model_dump(mode="json"),
        "steps": run.steps,
        "arithmetic": "bf16" if bf16 else "fp32",
        "processes": state.num_processes,
        "sharded": is_sharded(state),
        "source": text.source,
        "rows": [len(text.train), len(text.held_out)],
        **versions(torch, transformers, safetensors, accelerate),
    }


@dataclass(frozen=True)
class _Losses:
    """Of the result, on held-out text."""

    stored: float | None
    unrounded: float | None
    """Before rounding; None where nothing was rounded."""
    types: tuple[str, ...]
    """That it was rounded to."""


def _settled_losses(trainer: HealingTrainer) -> _Losses:
    """Make the model what will be stored; return its loss as that, and what it was before."""
    trained, types = trainer.trained, trainer.trained.rounds_to
    measures = trainer.eval_dataset is not None
    unrounded = trainer.measure(trainer.model) if measures and types else None
    trained.settle()
    return _Losses(trainer.measure(trainer.model) if measures else None, unrounded, types)


@dataclass(frozen=True)
class _Result:
    steps: int
    """At which the weights stand."""
    last_step: int
    trained_parameters: int


def _train(trainer: HealingTrainer, work: Work, run: Sizes, state: PartialState) -> _Result:
    """Train, from the last whole checkpoint on where there is one, and take the best weights."""
    with state.main_process_first():  # it removes what was cut short; the others only look
        last = work.last_checkpoint()
        at = _step_of(last) if last else 0
        work.rewind(at, write=state.is_main_process)
    finished = at >= run.steps or should_stop(work.history, trainer.spec, trainer.phases)
    if not finished:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        at = trainer.state.global_step
    else:
        trainer.spread()
    best = _best_step(work.history) if trainer.eval_dataset is not None else at
    if (finished or best != at) and best:
        trainer.load_trained(work.path / f"checkpoint-{best}")
    return _Result(best or at, at, trainer.trained.count())


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _best_step(history: list[dict[str, Any]]) -> int:
    """Return the step with the lowest held-out loss; the first of equal ones, as the Trainer."""
    measured = [line for line in history if "held_out_loss" in line]
    return int(min(measured, key=lambda line: line["held_out_loss"])["step"])


def _collator(model: Any, *, mixes: bool) -> Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]:
    """Return what makes a batch of rows; FlashAttention wants one long row."""
    if mixes:
        return collate_apart
    return collate_flat if model.config._attn_implementation == "flash_attention_2" else collate


def _open(work: Work, place: Place, key: dict[str, Any], state: PartialState) -> dict[str, Any]:
    """Make the working folder or find it as it should be; return what was measured already.

    Raises:
        HealingError: if something is there that may not be thrown away.
    """
    going_on = place.resume and work.exists
    work.check_free(resume=place.resume, overwrite=place.overwrite)
    state.wait_for_everyone()  # all have looked, before one changes what they looked at
    if state.is_main_process:
        work.hold()
    if going_on:
        return work.load(key)
    if state.is_main_process:
        work.begin(key)
    state.wait_for_everyone()
    return {"format": FORMAT, "key": key}


def _measure(trainer: HealingTrainer, tokenizer: Any, teacher_loss: float | None) -> dict[str, Any]:
    """Return the losses and answers of the model as it is, and the teacher's loss.

    Args:
        trainer: has model, teacher and rows.
        tokenizer: for answers.
        teacher_loss: of a teacher that was there before.
    """
    measures = trainer.eval_dataset is not None
    teacher = trainer.teacher
    return {
        "loss": trainer.measure(trainer.model) if measures else None,
        "teacher": trainer.measure(teacher) if measures and teacher is not None else teacher_loss,
        "answers": _answers(trainer, tokenizer),
    }


def _answers(trainer: HealingTrainer, tokenizer: Any) -> list[str]:
    """Return the model's answers; of a model spread over processes, all must ask."""
    if not (trainer.args.should_save or trainer.is_fsdp_enabled):
        return []
    with trainer.compute_loss_context_manager():
        return answers(trainer.model, tokenizer)


def _notes(before: float | None, losses: _Losses, result: _Result, run: Sizes) -> list[str]:
    notes, after = [], losses.stored
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
    if result.last_step < run.steps:
        notes.append(
            f"Stopped early, after {result.last_step} of {run.steps} steps: the held-out loss "
            "did not fall any more."
        )
    if result.steps < result.last_step:
        notes.append(f"The weights are those of step {result.steps}, the best measured.")
    return notes
