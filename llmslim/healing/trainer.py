"""transformers' Trainer with our losses, learning rates, held-out loss and checkpoints.

Differences from the Trainer:

- the loss is an objective's, summed over tokens and divided by the tokens of the whole step, so
  that a step does not depend on how it is split into passes and processes;
- the held-out loss is that of the model as it would be stored;
- bf16 is autocast around the forward pass only; accelerate's would copy all logits to float32;
- a loss or gradient that is not finite ends the training before the optimiser's step;
- checkpoints hold only the trained parameters, under their original names.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from llmslim.anatomy.sites import find_layers
from llmslim.compat import after_clipping, set_checkpoint_loader, set_train_sampler
from llmslim.errors import HealingError
from llmslim.healing.distributed import (
    check_sharding,
    full_tensor,
    is_sharded,
    named_full_parameters,
    overwrite,
    processes,
)
from llmslim.healing.healing_dir import HealingDir
from llmslim.healing.inputs import HealInputs
from llmslim.healing.measure import answers, held_out_loss
from llmslim.healing.objectives import Objective, Step
from llmslim.healing.plan import StepPlan, rate_share, training_arguments
from llmslim.healing.report import held_out_losses, should_stop, tokens_seen
from llmslim.healing.rows import PaddedRows, SeededSampler, collator_for
from llmslim.healing.teacher_cache import TeacherCache
from llmslim.healing.trainable import Trainable
from llmslim.progress import Progress

WEIGHTS = "trained.safetensors"


class HealingTrainer(Trainer):
    """A Trainer of one healing.

    Args:
        inputs: text, options, tokenizer and teacher.
        trainable: the prepared model.
        objective: the loss.
        plan: of the steps.
        folder: of the healing; it is open.
        bf16: whether the arithmetic is bfloat16.
        progress: called after every step.
    """

    def __init__(
        self,
        inputs: HealInputs,
        trainable: Trainable,
        objective: Objective,
        plan: StepPlan,
        folder: HealingDir,
        *,
        bf16: bool,
        progress: Progress,
    ) -> None:
        self.spec, self.trainable, self.plan, self.folder = inputs.spec, trainable, plan, folder
        held_out, count = inputs.text.held_out, processes().num_processes
        super().__init__(
            model=trainable.model,
            args=training_arguments(self.spec, plan, folder.path, evaluates=len(held_out) > 0),
            train_dataset=PaddedRows(
                inputs.text.train, self.spec.micro_batch * count if count > 1 else 1
            ),
            eval_dataset=held_out if len(held_out) else None,
            data_collator=collator_for(trainable.model, mixes=inputs.mixes),
        )
        # Our losses are already divided by the tokens of the step.
        self.model_accepts_loss_kwargs = True
        self.inputs, self.teacher = inputs, inputs.teacher
        self.objective: Objective = objective
        self.teacher_cache: TeacherCache | None = None
        self.bf16, self.progress = bf16, progress
        self.step_loss, self.grad_norm, self.step_tokens = 0.0, 0.0, 0
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
                self.remove_callback(callback)
        # The order of rows does not depend on the number of processes.
        set_train_sampler(self, partial(SeededSampler, seed=self.spec.seed, seen=plan.rows))
        set_checkpoint_loader(self, self.load_trained)
        after_clipping(self, self._check_step)
        self.recorder = HistoryCallback(self)
        self.add_callback(self.recorder)

    def create_accelerator_and_postprocess(self) -> None:
        """Make the Accelerator; where it shards the model, let it do so layer by layer.

        Raises:
            HealingError: if it would shard the model in a way that healing does not support.
        """
        state = cast(Any, self.args.distributed_state)
        if is_sharded(state) and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate shards models over accelerators only; torch can also do it over CPUs.
            state.distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        check_sharding(self.accelerator, self.spec)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.auto_wrap_policy is None:
            model = self.trainable.model
            layers = model.get_submodule(find_layers(model).path)
            plugin.auto_wrap_policy = transformer_auto_wrap_policy
            plugin.transformer_cls_names_to_wrap = sorted({type(one).__name__ for one in layers})

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return the passes of a step, and the number of tokens that all processes predict."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        predicted = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in samples)
        seen = sum(int(batch.pop("tokens").sum()) for batch in samples)
        counts = torch.tensor([float(predicted), float(seen)], device=device)
        counts = self.accelerator.reduce(counts, "sum")
        self.step_tokens = int(counts[1])
        return samples, counts[0].clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this pass's part of the step's mean loss.

        Raises:
            HealingError: if it has no gradient: some layers pass none on if their input has none.
        """
        inputs = dict(inputs)
        labels_NL = inputs.pop("labels")
        rows_N, stored = inputs.pop("rows", None), None
        if self.teacher_cache is not None:
            rows = [] if rows_N is None else rows_N.tolist()
            stored = self.teacher_cache.topk_of(rows, labels_NL.device)
        step = Step(model, inputs, labels_NL, self.spec, self.teacher, stored)
        total = self.objective.loss(step)
        if not total.requires_grad:
            raise HealingError(
                f"heal.train: {self.spec.train}, but the layers of this architecture "
                f"({type(self.trainable.model).__name__}) pass gradients on only if the embedding "
                "is trained too. Train `all`."
            )
        # DDP and FSDP average gradients over processes, but ours must be summed.
        loss = total * self.accelerator.num_processes / num_items_in_batch
        return (loss, None) if return_outputs else loss

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Return the precision of the forward pass."""
        stack = super().compute_loss_context_manager()
        if self.bf16:
            stack.enter_context(torch.autocast(self.args.device.type, dtype=torch.bfloat16))
        return stack

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """Do one pass, and add its loss to the step's."""
        loss = super().training_step(*args, **options)
        self.step_loss += float(loss)
        return loss

    def _check_step(self, norm: Any) -> None:
        """Refuse a step that would leave no number in the weights.

        Args:
            norm: of the gradient.

        Raises:
            HealingError: if the loss or the gradient is not finite, in all processes together.
        """
        self.grad_norm = float(full_tensor(norm))
        loss = torch.tensor(self.step_loss, device=self.args.device)
        self.step_loss = float(self.accelerator.reduce(loss, "mean"))
        if not math.isfinite(self.step_loss) or not math.isfinite(self.grad_norm):
            what = "loss" if not math.isfinite(self.step_loss) else "gradient"
            value = self.step_loss if what == "loss" else self.grad_norm
            raise self._not_finite(self.state.global_step + 1, what, value)

    def _not_finite(self, step: int, what: str, value: float) -> HealingError:
        last = self.folder.last_checkpoint() if self.args.should_save else None
        kept = f"The last good state is in {last}." if last else "No state was saved before."
        return HealingError(
            f"step {step}: the {what} is {value}; it must be finite. {kept} "
            "Start over with a lower learning_rate, or with other text."
        )

    def evaluate(self, *_args: Any, **_options: Any) -> dict[str, float]:
        """Measure the held-out loss.

        Raises:
            HealingError: if it is not finite; nothing is saved then.
        """
        with self.trainable.as_stored():
            loss = cast(float, self.measure(self.model_wrapped))
        step = self.state.global_step
        if not math.isfinite(loss):
            raise self._not_finite(step, "held-out loss", loss)
        metrics = {"eval_loss": loss}
        self.folder.add_history({"step": step, "held_out_loss": loss}, write=self.args.should_save)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def measure(self, model: Any) -> float | None:
        """Return the loss of a model on the held-out rows; None without such rows."""
        if self.eval_dataset is None:
            return None
        with self.compute_loss_context_manager():
            return held_out_loss(
                model,
                cast(Any, self.eval_dataset),
                self.data_collator,
                micro_batch=self.spec.micro_batch,
                accelerator=self.accelerator,
            )

    def answers(self) -> list[str]:
        """Return the model's answers; all processes compute them if the model is sharded."""
        if not (self.args.should_save or self.is_fsdp_enabled):
            return []
        with self.compute_loss_context_manager():
            return answers(self.model, self.inputs.tokenizer)

    def measure_start(self) -> None:
        """Measure the model and the teacher, once, before the first step."""
        measured = self.folder.measured
        if "loss" in measured:
            return
        self.progress(0, self.plan.steps, "measuring the model before healing")
        loss, teacher = self.measure(self.model), measured.get("teacher")
        if self.teacher is not None:
            teacher = self.measure(self.teacher)
        self.folder.add_measured(
            loss=loss, teacher=teacher, answers=self.answers(), write=self.args.should_save
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make AdamW with a learning rate for what the recipe changed and one for the rest."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        spec = self.spec
        rates = {True: spec.block_learning_rate or spec.learning_rate, False: spec.learning_rate}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = (name in self.trainable.changed, parameter.ndim > 1)
                groups.setdefault(key, []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": rates[changed],
                    "changed": changed,
                    # Norms and biases are vectors.
                    "weight_decay": spec.weight_decay if matrix else 0.0,
                }
                for (changed, matrix), parameters in groups.items()
            ],
            lr=spec.learning_rate,
            fused=True,  # one pass over memory: six times as fast on a CPU
        )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Make the schedule of the learning rates, which are never 0."""
        if self.lr_scheduler is None:
            share = partial(rate_share, spec=self.spec, steps=num_training_steps)
            self.lr_scheduler = LambdaLR(optimizer or cast(Any, self.optimizer), share)
        return self.lr_scheduler

    def save_model(
        self,
        output_dir: str | None = None,
        _internal_call: bool = False,
    ) -> None:
        """Save the trained parameters by name."""
        weights = {}
        for name, parameter in named_full_parameters(self.trainable.model).items():
            if parameter.requires_grad:
                value = full_tensor(parameter.detach())  # in all processes
                if self.args.should_save:
                    weights[name] = value.cpu().contiguous()
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(weights, folder / WEIGHTS)

    def load_trained(self, folder: Path) -> None:
        """Load the parameters of a checkpoint, in place."""
        saved = load_file(folder / WEIGHTS)
        for name, parameter in named_full_parameters(self.trainable.model).items():
            if parameter.requires_grad:
                overwrite(parameter, saved[name])

    def shard(self) -> None:
        """Shard the model over the processes without training, where training would do so."""
        if self.is_fsdp_enabled:
            self.create_optimizer()  # accelerate needs it beside the model
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model


class HistoryCallback(TrainerCallback):
    """Writes the history, shows progress, stops early."""

    def __init__(self, trainer: HealingTrainer) -> None:
        self.trainer = trainer
        self.seconds, self.tokens, self.seen, self.began = 0.0, 0, 0, 0.0
        self.rates: dict[bool, float] = {}

    @property
    def tokens_per_second(self) -> float:
        """While training, without the time for measuring and saving."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Measure the model; count tokens from where training continues."""
        self.seen = tokens_seen(self.trainer.folder.history)
        self.trainer.measure_start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Start the clock."""
        self.began = time.perf_counter()
        self.trainer.step_loss = 0.0
        groups = cast(Any, self.trainer.optimizer).param_groups
        self.rates = {group["changed"]: group["lr"] for group in groups}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Record the step, and show it."""
        trainer = self.trainer
        self.seconds += time.perf_counter() - self.began
        self.tokens += trainer.step_tokens
        self.seen += trainer.step_tokens
        entry = {
            "step": state.global_step,
            "loss": trainer.step_loss,
            "grad_norm": trainer.grad_norm,
            "learning_rate": self.rates.get(False, self.rates.get(True)),
            "tokens": self.seen,
            "tokens_per_second": round(self.tokens_per_second, 1),
        }
        if trainer.spec.block_learning_rate is not None and True in self.rates:
            entry["block_learning_rate"] = self.rates[True]
        trainer.folder.add_history(entry, write=args.should_save)
        measured = held_out_losses(trainer.folder.history)
        shown = f", held-out {measured[-1]:.3f}" if measured else ""
        trainer.progress(
            state.global_step,
            state.max_steps,
            f"loss {trainer.step_loss:.3f}{shown}, {self.tokens_per_second:,.0f} tokens/s",
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Stop when the held-out loss no longer falls."""
        if should_stop(self.trainer.folder.history, self.trainer.spec.patience):
            control.should_training_stop = True
