"""Train all that surgery changed together, on what the dense model predicts.

A fit layer by layer repairs every layer for itself, and cannot know which of its errors the
predictions suffer from, nor what later layers could make good. After it, the blocks, the narrowed
MLPs and the norms of the whole model descend together on

    KL(dense || slim), over the whole vocabulary, summed over the tokens of the calibration windows,

as in distillation (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). The dense predictions are
made once, by the fit before it, and kept as what the dense head is given: a vocabulary is many
times as wide as that. All else of the model stays as it is, embeddings and attention among it.

The whole model is in memory, in float32 what is trained, with its gradients, the two moments of the
optimiser and the best weights so far: 20 bytes for each parameter that is trained.

Shapes: windows of N x L tokens, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmslim.anatomy.layer_calls import TailModel, layer_norms_in_own_type, replaced_forward
from llmslim.anatomy.module_kinds import module_kind
from llmslim.anatomy.predictions import divergence, sum_over_tokens
from llmslim.anatomy.sites import find_layers
from llmslim.editing.plans import Plan
from llmslim.errors import TargetError
from llmslim.fitting.descent import Descent, Loss, Snapshot, only_moving
from llmslim.fitting.layer_store import DenseStates
from llmslim.init import wide
from llmslim.recipe import EndToEnd

CHECKS = 8
"""How often the held-out divergence is measured."""
TRAINED_BYTES = 20
"""Memory of a trained parameter: itself, gradient, two moments, best value; float32."""


@dataclass(frozen=True)
class Trained:
    """The result of the training."""

    before: float
    """Divergence from the dense predictions on held-out text, nats per token."""
    after: float
    steps: int

    @property
    def note(self) -> str:
        """A sentence for the report."""
        return (
            f"Trained end to end for {self.steps} steps: predictions on held-out text are "
            f"{self.after:.3g} nats a token from the dense model's, {self.before:.3g} before."
        )


@torch.no_grad()
def train_end_to_end(
    model: Any,
    plan: Plan,
    spec: EndToEnd,
    states: DenseStates,
    *,
    head: nn.Module | None = None,
    seed: int = 0,
    recompute: bool = False,
    saved: Snapshot | None = None,
    save: Callable[[Snapshot], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Trained:
    """Train what a plan changed, in place.

    Args:
        model: as the plan has made it, its norms still those of the dense model.
        plan: what was changed.
        spec: how many steps of what length.
        states: of the dense model on the calibration text.
        head: the dense model's head; the model's own by default, which must then be dense.
        seed: of the order of the windows.
        recompute: keep the input of each layer alone and compute the rest twice, for memory.
        saved: a snapshot to continue from.
        save: called with a snapshot now and then.
        progress: called after each step, with its name.

    Raises:
        TargetError: if the model has no head that gives logits.
    """
    own = model.get_output_embeddings()
    if own is None:
        raise TargetError(f"{type(model).__name__}: no head to train end to end with.")
    head = head or own
    was_training = model.training
    names = [name for name, _ in trained_parameters(model, plan)]
    with _prepared(model, head, names, states, recompute=recompute) as parameters:
        dense = _DensePredictions(model, own, head, states)
        descent = Descent(
            _divergence_from(model, dense, states),
            parameters,
            range(states.fitting),
            range(states.fitting, len(states.ids)),
            each=max(1, spec.tokens // states.ids[0].numel()),
            steps=spec.steps,
            lr=spec.lr,
            seed=seed,
            checks=CHECKS,
        )
        if saved is not None:
            descent.restore(saved)

        def stepped(step: int) -> None:
            if progress is not None:
                progress(f"training end to end, step {step} of {spec.steps}")

        before, after = descent.run(stepped, save)
    model.train(was_training)
    tokens = sum(ids.numel() for ids in states.ids[states.fitting :])
    return Trained(before / tokens, after / tokens, spec.steps)


def trained_parameters(model: nn.Module, plan: Plan) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that are trained: what a plan changed, and norms.

    Args:
        model: as the plan has made it, with its new names.
        plan: what was changed.
    """
    changed = {site.new_name for site in plan.sites}
    changed |= {plan.new_name(name) for mlp in plan.mlps for name in mlp.sites}
    for name, parameter in model.named_parameters():
        holder, _, leaf = name.rpartition(".")
        around = holder.split(".")
        inside = any(".".join(around[:n]) in changed for n in range(1, len(around) + 1))
        kind = module_kind(model.get_submodule(holder), {leaf: parameter})
        if inside or name in changed or kind == "a norm":
            yield name, parameter


class _DensePredictions:
    """The dense model's logits, made of what its head is given.

    Args:
        model: whose code around the head gives the logits; its norms are still dense.
        own: its head.
        head: the dense model's.
        states: of the dense model.
    """

    def __init__(self, model: Any, own: nn.Module, head: nn.Module, states: DenseStates) -> None:
        self._own, self._head = own, head.forward  # `own` may be the same module
        layers = list(model.get_submodule(find_layers(model).path))
        self._tail = TailModel(model, layers, states.ids[0], autocast=states.autocast)
        self._end, self._ids = len(layers), states.ids
        self._given: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            self._given.append(x)
            return x[..., :1]

        with replaced_forward(own, keep):
            for ids, hidden in zip(states.ids, states.hidden, strict=True):
                self._tail.logits(self._end, hidden, ids)
        self._stand_in = torch.zeros_like(states.hidden[0])

    @torch.no_grad()
    def logits(self, window: int) -> Tensor:
        """Return the logits of a window, (N, L, V)."""
        given = self._given[window]
        with replaced_forward(self._own, lambda _x: self._head(given)):
            return self._tail.logits(self._end, self._stand_in, self._ids[window])


def _divergence_from(model: Any, dense: _DensePredictions, states: DenseStates) -> Loss:
    """Return the loss of a window: the divergence from the dense predictions, in nats."""
    autocast = states.autocast

    def loss(window: int) -> Tensor:
        expected_TV = dense.logits(window).flatten(0, 1)
        ids = states.ids[window]
        with torch.autocast(ids.device.type, autocast, enabled=autocast is not None):
            logits_TV = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)

        def part(logits_CV: Tensor, where: slice) -> Tensor:
            expected_CV = expected_TV[where].float().log_softmax(-1)
            return divergence(expected_CV, logits_CV.log_softmax(-1)).sum()

        return sum_over_tokens(logits_TV, part)

    return loss


@contextmanager
def _prepared(
    model: Any, head: nn.Module, names: Iterable[str], states: DenseStates, *, recompute: bool
) -> Iterator[list[nn.Parameter]]:
    """Give a model the types, the mode and the layers for training; take them back afterwards.

    Yields:
        The parameters that are trained, in float32.
    """
    parameters = [model.get_parameter(name) for name in names]
    # Under autocast what is not trained may stay as narrow as it is.
    widened: Iterable[Tensor] = parameters
    if states.autocast is None:
        widened = {*model.parameters(), *model.buffers(), *head.parameters()}
    types = [(tensor, tensor.dtype) for tensor in widened]
    model.eval()
    with ExitStack() as stack:
        if recompute:
            for layer in model.get_submodule(find_layers(model).path):
                stack.enter_context(replaced_forward(layer, _recomputed(layer.forward)))
        if states.autocast is not None:
            stack.enter_context(layer_norms_in_own_type(model))
        stack.enter_context(only_moving(model, parameters))
        try:
            for tensor, dtype in types:
                if dtype.is_floating_point:
                    tensor.data = wide(tensor.data)
            yield parameters
        finally:
            for tensor, dtype in types:
                tensor.data = tensor.data.to(dtype)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward pass whose inner results are computed again for the backward pass."""
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
