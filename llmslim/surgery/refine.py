"""Fit one decoder layer's output to the dense layer's by gradient, after the closed forms.

A closed form fits each projection to linear targets; what the activation between them makes of
the errors it cannot see. A short descent on the layer's own output can. Every parameter's step is
in units of its root mean square, so that one learning rate serves every model and structure, and
the best weights on held-out tokens are the ones that stay: refinement never makes a layer worse.

Shapes: windows of L tokens, D = hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from llmslim.recipe import Refine

STEP_TOKENS = 1024
"""Tokens of one step."""
_CHECKS = 4
"""How often the held-out error is looked at."""
_WARM_UP = 0.1

Window = tuple[int, Tensor, Tensor]
"""A window's number, the output wanted (1, L, D), and a factor for each token."""


def refine_layer(
    run: Callable[[int], Tensor],
    parameters: Sequence[nn.Parameter],
    windows: Sequence[Window],
    held_out: Sequence[Window],
    spec: Refine,
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """Descend on a layer's squared output error, in place.

    Args:
        run: the layer, from a window's number to its output; float32.
        parameters: what moves.
        windows: to fit on.
        held_out: to choose on.
        spec: how long and how fast.
        seed: of the order of the windows.

    Returns:
        The squared error on held-out tokens before and after; never more after.
    """

    def error(window: Window) -> Tensor:
        number, wanted, factor = window
        return ((run(number) - wanted) * factor).square().sum()

    def on_held_out() -> float:
        with torch.no_grad():
            return sum(float(error(window)) for window in held_out)

    before = best = on_held_out()
    kept = [p.detach().clone() for p in parameters]
    frozen = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        optimizer = torch.optim.Adam(
            [{"params": [p], "unit": _rms(p)} for p in parameters], betas=(0.9, 0.95), eps=1e-12
        )
        order = _endless(len(windows), seed)
        each = max(1, STEP_TOKENS // windows[0][1].shape[1])
        with torch.enable_grad():
            for step in range(spec.steps):
                for group in optimizer.param_groups:
                    group["lr"] = spec.lr * group["unit"] * _schedule(step, spec.steps)
                optimizer.zero_grad()
                for _ in range(min(each, len(windows))):
                    error(windows[next(order)]).backward()
                optimizer.step()
                if (step + 1) % max(1, spec.steps // _CHECKS) == 0 or step + 1 == spec.steps:
                    now = on_held_out()
                    if now < best:
                        best = now
                        kept = [p.detach().clone() for p in parameters]
    finally:
        with torch.no_grad():
            for parameter, value, flag in zip(parameters, kept, frozen, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(flag)
                parameter.grad = None
    return before, best


def _rms(parameter: Tensor) -> float:
    return float(parameter.detach().square().mean().sqrt().clamp_min(1e-8))


def _schedule(step: int, steps: int) -> float:
    """Return the share of the peak step: up in a tenth of the steps, then down as a cosine."""
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _endless(count: int, seed: int) -> Iterator[int]:
    """Yield indices in an order drawn anew for every pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
