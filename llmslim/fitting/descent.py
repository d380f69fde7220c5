"""A gradient descent in place, for one layer as for a whole model.

Every parameter's step is in units of its root mean square, so that one learning rate serves every
model and structure. The weights that are best on held-out tokens are kept, those before the first
step among them: a descent never makes the held-out loss worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_WARM_UP = 0.1
_SLOTS = ("step", "exp_avg", "exp_avg_sq")
"""What Adam keeps of each parameter that has had a gradient."""

Windows = Sequence[int]
"""Windows, by number."""
Loss = Callable[[int], Tensor]
"""From a window's number to a loss, summed over the window's tokens."""
Snapshot = dict[str, Tensor]
"""All that a descent needs to be continued."""


def steps_done(snapshot: Snapshot) -> int:
    """Return how many steps were done when a snapshot was made."""
    return int(snapshot["numbers"][0])


class Descent:
    """A descent, step by step.

    Args:
        loss: of a window; made small.
        parameters: what moves, in place; float32.
        windows: to fit on.
        held_out: to choose on.
        each: how many of the windows make a step.
        steps: how many steps.
        lr: the peak step, in units of each parameter's root mean square.
        seed: of the order of the windows.
        checks: how often the held-out loss is measured.
    """

    def __init__(
        self,
        loss: Loss,
        parameters: Sequence[nn.Parameter],
        windows: Windows,
        held_out: Windows,
        *,
        each: int,
        steps: int,
        lr: float,
        seed: int = 0,
        checks: int = 4,
    ) -> None:
        self._loss, self._parameters = loss, parameters
        self._windows, self._held_out = windows, held_out
        self._each, self.steps, self._lr = min(each, len(windows)), steps, lr
        self._seed, self._every = seed, max(1, steps // checks)
        self.done = 0
        """Steps taken."""
        self.before = self.best = math.inf
        """The loss on held-out tokens before the first step, and of the best weights so far."""
        self._kept: list[Tensor] = []
        """The best weights so far."""
        self._units: list[float] = []
        """Root mean square of each parameter before the first step."""
        self._optimizer: torch.optim.Adam | None = None

    def run(
        self,
        stepped: Callable[[int], None] | None = None,
        checked: Callable[[Snapshot], None] | None = None,
    ) -> tuple[float, float]:
        """Take the steps that are left; leave the best weights in place.

        Args:
            stepped: called with the number of steps taken, after each.
            checked: called with a snapshot after each measurement but the last.

        Returns:
            The loss on held-out tokens before and after; never more after.
        """
        if self._optimizer is None:
            self._begin()
        optimizer = self._optimizer
        assert optimizer is not None
        order = _endless(self._windows, self._seed)
        for _ in range(self.done * self._each):
            next(order)
        try:
            with torch.enable_grad():
                while self.done < self.steps:
                    self._step(optimizer, order)
                    if stepped is not None:
                        stepped(self.done)
                    if self.done % self._every == 0 or self.done == self.steps:
                        self._choose()
                        if checked is not None and self.done < self.steps:
                            checked(self._snapshot(optimizer))
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, self._kept, strict=True):
                    parameter.copy_(value)
                    parameter.grad = None
        return self.before, self.best

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot of the same descent."""
        self.done = steps_done(snapshot)
        _, self.before, self.best = snapshot["numbers"].tolist()
        self._units, self._kept = snapshot["units"].tolist(), []
        self._optimizer = self._new_optimizer()
        for n, parameter in enumerate(self._parameters):
            parameter.copy_(snapshot[f"now.{n}"])
            self._kept.append(snapshot[f"kept.{n}"].to(parameter.device, copy=True))
            for slot in _SLOTS:
                if (value := snapshot.get(f"{slot}.{n}")) is not None:
                    where = "cpu" if slot == "step" else parameter.device
                    self._optimizer.state[parameter][slot] = value.to(where, copy=True)

    def _begin(self) -> None:
        self.before = self.best = self._on_held_out()
        self._kept = [p.detach().clone() for p in self._parameters]
        self._units = [_rms(p) for p in self._parameters]
        self._optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Adam:
        groups = [{"params": [p]} for p in self._parameters]
        return torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12)

    def _step(self, optimizer: torch.optim.Adam, order: Iterator[int]) -> None:
        share = self._lr * _schedule(self.done, self.steps)
        for group, unit in zip(optimizer.param_groups, self._units, strict=True):
            group["lr"] = share * unit
        optimizer.zero_grad()
        for _ in range(self._each):
            self._loss(next(order)).backward()
        optimizer.step()
        self.done += 1

    def _choose(self) -> None:
        """Keep the weights of now if they are the best on held-out tokens."""
        now = self._on_held_out()
        if now < self.best:
            self.best = now
            for kept, parameter in zip(self._kept, self._parameters, strict=True):
                kept.copy_(parameter.detach())

    def _on_held_out(self) -> float:
        with torch.no_grad():
            return sum(float(self._loss(window)) for window in self._held_out)

    def _snapshot(self, optimizer: torch.optim.Adam) -> Snapshot:
        numbers = [float(self.done), self.before, self.best]
        found = {
            "numbers": torch.tensor(numbers, dtype=torch.float64),
            "units": torch.tensor(self._units, dtype=torch.float64),
        }
        for n, (parameter, kept) in enumerate(zip(self._parameters, self._kept, strict=True)):
            found |= {f"now.{n}": parameter.detach(), f"kept.{n}": kept}
            state = optimizer.state[parameter]
            found |= {f"{slot}.{n}": state[slot] for slot in _SLOTS if slot in state}
        return found


def descend(
    loss: Loss,
    parameters: Sequence[nn.Parameter],
    windows: Windows,
    held_out: Windows,
    **options: Any,
) -> tuple[float, float]:
    """Carry out a `Descent` in one go; arguments as there, the result as of its `run`."""
    return Descent(loss, parameters, windows, held_out, **options).run()


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
