"""Move the weights of one decoder layer by gradient, after the closed forms.

A closed form fits each projection to linear targets; what the activation between them makes of
the errors it cannot see. A short descent on the layer's own output can, and one on what the rest of
the model predicts from it (see `predictions`) still more.

Every parameter's step is in units of its root mean square, so that one learning rate serves every
model and structure, and the best weights on held-out tokens are the ones that stay: refinement
never makes a layer worse.

Shapes: windows of N x L tokens, D = hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmslim.surgery.streams import importance

STEP_TOKENS = 1024
"""Tokens of one step, at the least."""
LOGITS_LR = 1 / 3
"""Peak step on the model's predictions, as a share of that on the layer's output."""
_CHECKS = 4
"""How often the held-out error is looked at."""
_WARM_UP = 0.1

Windows = Sequence[int]
"""Windows, by number."""
Loss = Callable[[int], Tensor]
"""What is to become small, summed over the tokens of a window."""


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
    """Yield windows in an order drawn anew for every pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(windows), generator=generator).tolist():
            yield windows[index]
