"""Run a healing, or continue one that was interrupted.

The training is transformers' Trainer on accelerate; this file measures before and after, finds
where to continue, and restores models after errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import safetensors
import torch
import transformers
from accelerate import PartialState

from llmslim.healing.distributed import (
    gather_into,
    is_sharded,
    process_notes,
    processes,
    shard_copy,
)
from llmslim.healing.healing_dir import HealingDir
from llmslim.healing.inputs import HealInputs
from llmslim.healing.measure import PROMPTS
from llmslim.healing.packing_check import packing_notes
from llmslim.healing.plan import StepPlan, uses_bf16
from llmslim.healing.report import (
    Answer,
    HealReport,
    Losses,
    best_step,
    result_notes,
    should_stop,
    tokens_seen,
)
from llmslim.healing.restoring import as_it_was, to_compute
from llmslim.healing.rows import text_digest
from llmslim.healing.teacher_cache import TOP_K, TeacherCache
from llmslim.healing.trainable import Trainable, keep_activations, make_trainable
from llmslim.healing.trainer import HealingTrainer
from llmslim.progress import Progress, quietly
from llmslim.storage import model_digest, quiet, versions


def heal_model(
    inputs: HealInputs, folder: HealingDir, *, progress: Progress | None = None
) -> HealReport:
    """Train a model, in place.

    Where `accelerate launch` shards it over processes, each has all weights at the end.

    Args:
        inputs: of the healing. The teacher is unchanged in the end. With `store_teacher` it is off
            the device while the model trains; and if it was loaded by name, its parameters are then
            empty.
        folder: keeps what is needed to continue after a kill; the caller closes or removes it.
        progress: called after every step.

    Returns:
        The result, without a path.

    Raises:
        HealingError: if the training cannot begin or continue, or the loss is not finite. The
            folder then has the last good state, and the model its current weights, or none if it
            was sharded over processes.
    """
    objective, state = inputs.objective(), processes()
    model, teacher, spec = inputs.model, inputs.teacher, inputs.spec
    plan = StepPlan.of(spec, inputs.text, state.num_processes)
    bf16 = uses_bf16(spec, state.device)
    with (
        quiet(),
        as_it_was(model),
        as_it_was(teacher, weights=spec.teacher is None),  # one loaded by name is not needed later
    ):
        if teacher is not None:
            teacher.eval().requires_grad_(requires_grad=False)
        key = _key(inputs, plan, state, bf16=bf16)
        with _training(inputs, state) as trainable, folder.opened(key, state):
            shown = progress if progress and state.is_main_process else quietly
            trainer = HealingTrainer(
                inputs, trainable, objective, plan, folder, bf16=bf16, progress=shown
            )
            if spec.store_teacher:
                _cache_teacher(trainer, state)
            elif teacher is not None:
                to_compute(teacher, trainer.args.device, bf16=bf16)
            best, last = _train(trainer, state)
            trained = trainable.count()
            losses = _final_losses(trainer)
            after = trainer.answers()
            if trainable.model is not model:
                gather_into(model, trainable.model)
                trainable.model = model
    return _report(trainer, state, losses, after, trained=trained, best=best, last=last)


def _key(inputs: HealInputs, plan: StepPlan, state: PartialState, *, bf16: bool) -> dict[str, Any]:
    """Return what the result of a healing depends on, part by part."""
    text, teacher = inputs.text, inputs.teacher
    return {
        "the model": model_digest(inputs.model),
        "the text": text_digest(text),
        "the teacher": None if teacher is None else model_digest(teacher),
        **inputs.spec.model_dump(mode="json"),
        "steps": plan.steps,
        "arithmetic": "bf16" if bf16 else "fp32",
        "processes": state.num_processes,
        "sharded": is_sharded(state),
        "source": text.source,
        "rows": [len(text.train), len(text.held_out)],
        **versions(torch, transformers, safetensors, accelerate),
    }


@contextmanager
def _training(inputs: HealInputs, state: PartialState) -> Iterator[Trainable]:
    """Prepare the model for training, or a copy to shard; undo it in the end."""
    given, spec = inputs.model, inputs.spec
    trainable = make_trainable(
        shard_copy(given) if is_sharded(state) else given, spec, inputs.narrowed
    )
    try:
        keep_activations(trainable.model, keep=not spec.gradient_checkpointing)
        yield trainable
    finally:
        if trainable.model is given:
            trainable.release()


def _cache_teacher(trainer: HealingTrainer, state: PartialState) -> None:
    """Store the teacher's loss and its top-k logits for every row, then release the teacher.

    Model and teacher are never on the device together. The trainer then has a cache and no teacher.
    """
    teacher, spec, device = trainer.teacher, trainer.spec, trainer.args.device
    model: Any = trainer.model
    folder = trainer.folder

    def load() -> Any:
        model.to("cpu")
        to_compute(teacher, device, bf16=trainer.bf16)
        return teacher

    cache = TeacherCache(
        folder.teacher,
        folder.key_digest,
        top_k=spec.top_k or TOP_K,
        temperature=spec.temperature,
        bf16=trainer.bf16,
    )
    cache.fill(
        load,
        trainer.inputs.text.train,
        trainer.data_collator,
        micro_batch=spec.micro_batch,
        state=state,
        progress=trainer.progress,
    )
    if "teacher" not in folder.measured:
        folder.add_measured(teacher=trainer.measure(load()), write=state.is_main_process)
    trainer.teacher_cache, trainer.teacher = cache, None
    teacher.to("cpu")
    if spec.teacher is not None:  # loaded by name, and not needed any more
        for tensor in (*teacher.parameters(), *teacher.buffers()):
            tensor.data = torch.empty(0, dtype=tensor.dtype)
    if not trainer.is_fsdp_enabled:  # FSDP moves the shards
        model.to(device)


def _train(trainer: HealingTrainer, state: PartialState) -> tuple[int, int]:
    """Train, or continue from the last whole checkpoint; load the best weights.

    Returns:
        The step of the best weights, and the last step.
    """
    folder, planned = trainer.folder, trainer.plan.steps
    with state.main_process_first():  # removes incomplete checkpoints
        last = folder.last_checkpoint()
        at = int(last.name.rpartition("-")[2]) if last else 0
        folder.rewind(at, write=state.is_main_process)
    finished = at >= planned or should_stop(folder.history, trainer.spec.patience)
    if not finished:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        at = trainer.state.global_step
    else:
        trainer.shard()
    best = best_step(folder.history) if trainer.eval_dataset is not None else at
    if (finished or best != at) and best:
        trainer.load_trained(folder.path / f"checkpoint-{best}")
    return best or at, at


def _final_losses(trainer: HealingTrainer) -> Losses:
    """Finalise the weights for storing; return the model's losses."""
    trainable, types = trainer.trainable, trainer.trainable.rounds_to
    unrounded = trainer.measure(trainer.model) if types else None
    trainable.finalise()
    before = trainer.folder.measured["loss"]
    return Losses(before, trainer.measure(trainer.model), unrounded, types)


def _report(
    trainer: HealingTrainer,
    state: PartialState,
    losses: Losses,
    after: list[str],
    *,
    trained: int,
    best: int,
    last: int,
) -> HealReport:
    """Return the report of a finished training."""
    inputs, plan, folder = trainer.inputs, trainer.plan, trainer.folder
    start, history, text, spec = folder.measured, folder.history, inputs.text, inputs.spec
    return HealReport(
        path=None,
        objective=trainer.objective.name,
        train=spec.train,
        steps=best,
        tokens=tokens_seen(history, best),
        padding=text.padding,
        tokens_per_second=round(trainer.recorder.tokens_per_second, 1),
        trained_parameters=trained,
        loss_before=losses.before,
        loss_after=losses.stored,
        loss_unrounded=losses.unrounded,
        loss_teacher=start["teacher"],
        history=tuple(history),
        answers=tuple(map(Answer, PROMPTS, start["answers"], after)),
        source=text.source,
        licence=text.licence,
        settings=spec.model_dump(mode="json", exclude_none=True),
        notes=(
            *text.notes,
            *plan.notes,
            *process_notes(state),
            *packing_notes(mixes=inputs.mixes),
            *result_notes(losses, best=best, last=last, planned=plan.steps),
        ),
    )
