"""What an objective gets, and how to find one by its name.

An objective is one file in this folder, named as the objective, which defines

    NEEDS_TEACHER: bool          whether it needs the dense model
    def loss(step) -> Tensor     the loss of one pass, summed over the tokens to predict

A new objective is one new file and nothing else, or one in another package (`llmslim.plugins`).
Sums, not means: rows hold different numbers of tokens to predict, and only sums add up to the same
total over any split of a step into passes and processes.

Shapes: N = rows, L = tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmslim.errors import HealingError
from llmslim.plugins import OBJECTIVES, Objective
from llmslim.recipe import Heal


class TeacherTopK(NamedTuple):
    """The teacher's stored predictions for the P places of a pass that predict a token; K = top_k.

    Places are in the order of the rows, and of the tokens in a row.
    """

    log_p_PK: Tensor
    """Log of the probability of the likeliest tokens, at the options' temperature."""
    tokens_PK: Tensor
    """The likeliest tokens."""


@dataclass(frozen=True)
class Step:
    """One pass of one process."""

    model: Any
    """The model in training, perhaps wrapped for several processes: call this one."""
    inputs: dict[str, Tensor]
    """`input_ids` (N, L), and `position_ids` (N, L), which restart with every sample."""
    labels_NL: Tensor
    """The token at each place, -100 where it must not be predicted."""
    spec: Heal
    """The options."""
    teacher: Any = None
    """The dense model, frozen; None where there is none."""
    teacher_topk: TeacherTopK | None = None
    """The dense model's stored predictions for this pass, in place of `teacher`."""

    @property
    def targets_NL(self) -> Tensor:  # noqa: N802  (the shape is part of the name)
        """What each place should predict; see `next_tokens`."""
        return next_tokens(self.labels_NL)

    def forward(self, **options: Any) -> Any:
        """Call the model without a cache, which would let packed samples see each other."""
        return self.model(**self.inputs, use_cache=False, **options)

    @torch.no_grad()
    def teach(self, **options: Any) -> Any:
        """Call the teacher on the same tokens."""
        return self.teacher(**self.inputs, use_cache=False, **options)


def next_tokens(labels_NL: Tensor) -> Tensor:
    """Return the label after each place, (N, L); -100 where there is nothing to predict."""
    return nn.functional.pad(labels_NL[:, 1:], (0, 1), value=-100)


def objective_named(name: str) -> Objective:
    """Return an objective by its name.

    Raises:
        HealingError: if no objective has that name.

    Example:
        >>> objective_named("cross_entropy").needs_teacher
        False
    """
    objective = OBJECTIVES.get(name)
    if objective is None:
        raise HealingError(f"heal.objective: {name!r}; allowed {', '.join(OBJECTIVES.names())}.")
    return objective
