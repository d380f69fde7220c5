"""Train the blocks of one decoder layer together, after the closed forms.

A closed form fits each projection to linear targets and cannot see what the activation between them
makes of its errors. A short gradient descent on the layer's output can, and one on what the rest of
the model predicts from it (see `predictions`) still more. Where all blocks lie in the end of the
layer, as a rule in its MLP, only that end is run: what comes before it does not change.

Every parameter's step is in units of its root mean square, so that one learning rate serves every
model and structure. The weights that are best on held-out tokens are kept, the closed form's among
them: refinement never makes a layer worse.

Shapes: windows of N x L tokens, D = hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from llmslim.anatomy.layer_calls import importance
from llmslim.fitting.layer_pair import LayerOutputs, LayerPair
from llmslim.init import wide
from llmslim.recipe import Refine

STEP_TOKENS = 1024
"""Tokens of one step, at the least."""
LOGITS_LR = 1 / 3
"""Peak step on the model's predictions, as a share of that on the layer's output."""
_CHECKS = 4
"""How often the held-out loss is measured."""
_WARM_UP = 0.1

Windows = Sequence[int]
"""Windows, by number."""
Loss = Callable[[int], Tensor]
"""From a window's number to a loss, summed over the window's tokens."""


def refine_layer(
    model: nn.Module,
    pair: LayerPair,
    names: Sequence[str],
    spec: Refine,
    *,
    dense: list[Tensor] | None,
    predicted: Callable[[Callable[[int], Tensor]], Loss] | None,
    seed: int,
) -> LayerOutputs:
    """Descend on a layer's output error, then on what the rest of the model predicts from it.

    Args:
        model: the model that the slim layer is part of; its other weights get no gradients.
        pair: the layer, dense and slim; the slim one is changed.
        names: the modules in it whose weights are trained.
        spec: how many steps of what length.
        dense: the dense stream after the layer, (N, L, D) each, where it is known already.
        predicted: makes the loss of the model's predictions from a function that gives the layer's
            output by the window's number, (N, L, D); None where there is no such descent.
        seed: of the order of the windows.

    Returns:
        What is known of the streams after the layer.
    """
    wanted = dense or pair.outputs(pair.dense)
    tail = pair.tail(names)

    def run(window: int) -> Tensor:
        if tail is None:
            output: Tensor = pair.run(pair.slim, window)[0]
            return output
        before, x = tail.inputs[window]
        after: Tensor = before + pair.added(tail.module, x)
        return after

    losses = [(output_loss(run, wanted), spec.steps, spec.lr)]
    if predicted is not None:
        losses.append((predicted(run), spec.logits_steps, LOGITS_LR * spec.lr))
    own = [(held, held.dtype) for held in _floats(pair.slim)]
    for held, _ in own:  # small steps would be lost in bfloat16
        held.data = wide(held.data)
    moving = [p for name in names for p in pair.slim.get_submodule(name).parameters()]
    every = range(len(wanted))
    with only_moving(model, moving):
        for loss, steps, lr in losses:
            descend(
                loss,
                moving,
                every[: pair.fitting],
                every[pair.fitting :],
                each=max(1, STEP_TOKENS // wanted[0].shape[:2].numel()),
                steps=steps,
                lr=lr,
                seed=seed,
            )
    for held, dtype in own:  # each its own: some models keep a few in float32
        held.data = held.data.to(dtype)
    return LayerOutputs(wanted, tail.inputs, tail.module) if tail else LayerOutputs(wanted, [])


def output_loss(run: Callable[[int], Tensor], wanted: Sequence[Tensor]) -> Loss:
    """Return the squared error of a layer's output, as the fits before it weigh tokens.

    Args:
        run: the layer, from a window's number to its output, (N, L, D); float32.
        wanted: the output wanted of each window.
    """
    weights = [importance(output) for output in wanted]

    def loss(window: int) -> Tensor:
        return ((run(window) - wanted[window]) * weights[window]).square().sum()

    return loss


def descend(
    loss: Loss,
    parameters: Sequence[nn.Parameter],
    windows: Windows,
    held_out: Windows,
    *,
    each: int,
    steps: int,
    lr: float,
    seed: int = 0,
) -> tuple[float, float]:
    """Make a loss small, in place.

    Args:
        loss: of a window.
        parameters: what moves; float32.
        windows: to fit on.
        held_out: to choose on.
        each: how many of the windows make a step.
        steps: how many steps.
        lr: the peak step, in units of each parameter's root mean square.
        seed: of the order of the windows.

    Returns:
        The loss on held-out tokens before and after; never more after.
    """

    def on_held_out() -> float:
        with torch.no_grad():
            return sum(float(loss(window)) for window in held_out)

    before = best = on_held_out()
    kept = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(
        [{"params": [p], "unit": _rms(p)} for p in parameters], betas=(0.9, 0.95), eps=1e-12
    )
    order = _endless(windows, seed)
    try:
        with torch.enable_grad():
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["unit"] * _schedule(step, steps)
                optimizer.zero_grad()
                for _ in range(min(each, len(windows))):
                    loss(next(order)).backward()
                optimizer.step()
                if (step + 1) % max(1, steps // _CHECKS) == 0 or step + 1 == steps:
                    now = on_held_out()
                    if now < best:
                        best = now
                        kept = [p.detach().clone() for p in parameters]
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
                parameter.grad = None
    return before, best


@contextmanager
def only_moving(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Take gradients of some of a model's parameters, and of no others."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _rms(parameter: Tensor) -> float:
    return float(parameter.detach().square().mean().sqrt().clamp_min(1e-8))


def _schedule(step: int, steps: int) -> float:
    """Return the share of the peak step: up in a tenth of the steps, then down as a cosine."""
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _endless(windows: Windows, seed: int) -> Iterator[int]:
    """Yield windows, in a new random order for every pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(windows), generator=generator).tolist():
            yield windows[index]


def _floats(layer: nn.Module) -> Iterator[Tensor]:
    """Yield a layer's parameters and buffers that are not integers."""
    held = chain(layer.parameters(), layer.buffers())
    return (tensor for tensor in held if tensor.is_floating_point())
