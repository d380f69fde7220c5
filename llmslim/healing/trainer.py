"""transformers' Trainer with our losses, learning rates, held-out loss and checkpoints.

What is different from the Trainer as it is:

- the loss is an objective's, summed over tokens and divided by the tokens of the whole step, so
  that a step is the same step however it is split into passes and processes;
- what is measured on held-out text is the model as it would be stored;
- bf16 is autocast around the forward pass only; accelerate's own would copy all logits to float32;
- a loss or gradient that is not finite ends the training before the optimiser sees it;
- checkpoints hold the trained parameters under their plain names, nothing that did not change.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from llmslim.errors import HealingError
from llmslim.healing.measure import held_out_loss
from llmslim.healing.objectives import Objective, Step
from llmslim.healing.rows import Filled, Order
from llmslim.healing.processes import is_sharded
from llmslim.healing.distributed import check_sharding, overwrite, settled, whole
from llmslim.healing.sizes import Sizes, rate_share
from llmslim.healing.stored import StoredLogits
from llmslim.healing.trainable import Trained
from llmslim.healing.watch import Progress, Watch
from llmslim.healing.rundir import Work
from llmslim.recipe import Heal
from llmslim.surgery.sites import find_layers

WEIGHTS = "trained.safetensors"


class HealingTrainer(Trainer):
    """A Trainer of one healing.

    Args:
        spec: the options.
        trained: the model, made ready.
        phases: objectives, each with the step that it ends before.
        teacher: the dense model.
        layers: decoder layers with the teacher's that they stand for.
        bf16: whether the arithmetic is in bfloat16.
        position_ids: whether the model takes these.
        work: the working folder.
        run: how much there is to do.
        progress: told of every step.
        options: for `Trainer`.
    """

    def __init__(
        self,
        spec: Heal,
        trained: Trained,
        phases: list[tuple[Objective, int]],
        *,
        teacher: Any,
        layers: tuple[tuple[nn.Module, nn.Module], ...],
        bf16: bool,
        position_ids: bool,
        work: Work,
        run: Sizes,
        progress: Progress,
        **options: Any,
    ) -> None:
        self.spec, self.trained, self.phases, self.run = spec, trained, phases, run
        super().__init__(model=trained.model, **options)
        # Our losses are divided by the tokens of the step already.
        self.model_accepts_loss_kwargs = True
        self.teacher, self.layers, self.bf16 = teacher, layers, bf16
        self.position_ids, self.work = position_ids, work
        self.stored: StoredLogits | None = None
        self.begin: Callable[[], None] | None = None
        self.step_loss, self.grad_norm, self.step_tokens = 0.0, 0.0, 0
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
                self.remove_callback(callback)
        self.watch = Watch(self, progress)
        self.add_callback(self.watch)

    def create_accelerator_and_postprocess(self) -> None:
        """Make accelerate's object; where it spreads the model, do so layer by layer.

        Raises:
            HealingError: if it would spread the model as healing cannot.
        """
        state = cast(Any, self.args.distributed_state)
        if is_sharded(state) and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate spreads models over accelerators only; torch can over CPUs, the same way.
            state.distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        check_sharding(self.accelerator, self.spec)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.auto_wrap_policy is None:
            model = self.trained.model
            layers = model.get_submodule(find_layers(model).path)
            plugin.auto_wrap_policy = transformer_auto_wrap_policy
            plugin.transformer_cls_names_to_wrap = sorted({type(one).__name__ for one in layers})

    @property
    def phase(self) -> Objective:
        """The objective of the current step."""
        step = self.state.global_step
        return next((o for o, end in self.phases if step < end), self.phases[-1][0])

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        """Return the order of the rows, which does not depend on the number of processes."""
        rows = train_dataset or cast(Filled, self.train_dataset)
        return Order(rows, self.spec.seed, self.run.rows)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return the passes of a step, and how many tokens all processes predict in it."""
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
            HealingError: if it has no gradient: some layers pass none on that their input has not.
        """
        inputs = dict(inputs)
        labels_NL = inputs.pop("labels")
        if not self.position_ids:
            inputs.pop("position_ids", None)
        rows_N, taught = inputs.pop("rows", None), None
        if self.stored is not None:
            rows = [] if rows_N is None else rows_N.tolist()
            taught = self.stored.of(rows, labels_NL.device)
        step = Step(model, inputs, labels_NL, self.spec, self.teacher, self.layers, taught)
        total = self.phase.loss(step)
        if not total.requires_grad:
            raise HealingError(
                f"heal.train: {self.spec.train}, but the layers of this architecture "
                f"({type(self.trained.model).__name__}) pass no gradient on unless the embedding "
                "is trained, too. Train `all`."
            )
        # Gradients are averaged over processes, but sums are to be added up.
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

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip; refuse a step that would leave no number in the weights.

        Raises:
            HealingError: if the loss or a gradient is not finite, in all processes together.
        """
        norm: Any = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        self.grad_norm = float(whole(norm))
        loss = torch.tensor(self.step_loss, device=self.args.device)
        self.step_loss = float(self.accelerator.reduce(loss, "mean"))
        if not math.isfinite(self.step_loss) or not math.isfinite(self.grad_norm):
            what = "loss" if not math.isfinite(self.step_loss) else "gradient"
            value = self.step_loss if what == "loss" else self.grad_norm
            raise self._not_finite(self.state.global_step + 1, what, value)
        return norm

    def _not_finite(self, step: int, what: str, value: float) -> HealingError:
        last = self.work.last_checkpoint() if self.args.should_save else None
        kept = f"The last good state is kept in {last}." if last else "No state was saved before."
        return HealingError(
            f"step {step}: the {what} is {value}; it must be finite. {kept} "
            "Begin anew with a lower learning_rate, or with other text."
        )

    def evaluate(self, *_args: Any, **_options: Any) -> dict[str, float]:
        """Measure the held-out loss.

        Raises:
            HealingError: if it is not finite; nothing is saved then.
        """
        with self.trained.as_stored():
            loss = self.measure(self.model_wrapped)
        step = self.state.global_step
        if not math.isfinite(loss):
            raise self._not_finite(step, "held-out loss", loss)
        metrics = {"eval_loss": loss}
        self.work.note({"step": step, "held_out_loss": loss}, write=self.args.should_save)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def measure(self, model: Any) -> float:
        """Return the loss of a model on the held-out rows."""
        with self.compute_loss_context_manager():
            return held_out_loss(
                model,
                cast(Any, self.eval_dataset),
                self.data_collator,
                micro_batch=self.spec.micro_batch,
                accelerator=self.accelerator,
                position_ids=self.position_ids,
            )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make AdamW with one learning rate for what surgery changed and one for the rest."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        spec = self.spec
        rates = {True: spec.block_learning_rate or spec.learning_rate, False: spec.learning_rate}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = (name in self.trained.changed, parameter.ndim > 1)
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
            fused=True,  # one pass over memory: on a CPU six times as fast
        )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Make the schedule of the learning rates, of which none is 0."""
        if self.lr_scheduler is None:
            share = partial(rate_share, spec=self.spec, steps=num_training_steps)
            self.lr_scheduler = LambdaLR(optimizer or cast(Any, self.optimizer), share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def save_model(
        self,
        output_dir: str | None = None,
        _internal_call: bool = False,
    ) -> None:
        """Save the trained parameters by their names."""
        weights = {}
        for name, parameter in settled(self.trained.model).items():
            if parameter.requires_grad:
                value = whole(parameter.detach())  # all processes take part in that
                if self.args.should_save:
                    weights[name] = value.cpu().contiguous()
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(weights, folder / WEIGHTS)

    def _load_from_checkpoint(
        self,
        resume_from_checkpoint: str,
        model: Any = None,  # noqa: ARG002  (the Trainer's signature)
    ) -> None:
        """Read back what `save_model` wrote."""
        self.load_trained(Path(resume_from_checkpoint))

    def load_trained(self, folder: Path) -> None:
        """Take over the parameters of a checkpoint, in place."""
        saved = load_file(folder / WEIGHTS)
        for name, parameter in settled(self.trained.model).items():
            if parameter.requires_grad:
                overwrite(parameter, saved[name])

    def spread(self) -> None:
        """Spread a model over the processes that was not trained, where training would do it."""
        if self.is_fsdp_enabled:
            self.create_optimizer()  # accelerate takes no model alone
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model
