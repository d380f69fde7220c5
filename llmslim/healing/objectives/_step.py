"""What an objective is given, and how one is found by its name.

An objective is one file in this folder with the objective's name and in it

    NEEDS_TEACHER: bool          whether it cannot do without the dense model
    def loss(step) -> Tensor     the loss of one pass, summed over the tokens that are predicted

so a new objective is one new file and nothing else, or one in another package
(`llmslim.plugins`). Sums, not means: rows hold different numbers
of predicted tokens, and only sums add up to the same over any split of a step into passes and
processes.

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
    """What a teacher predicted, earlier, at the places of a pass that predict something.

    P = such places, in order of rows and places; K = top_k.
    """

    log_p_PK: Tensor
    """Log of the probability of its likeliest tokens, at the temperature of the options."""
    tokens_PK: Tensor
    """Which tokens these are."""


@dataclass(frozen=True)
class Step:
    """One pass of one process."""

    model: Any
    """The model in training, perhaps wrapped for several processes: what must be called."""
    inputs: dict[str, Tensor]
    """`input_ids` (N, L), and `position_ids` (N, L), which restart with every sample."""
    labels_NL: Tensor
    """The token at each place, -100 where it is not to be predicted."""
    spec: Heal
    """The options."""
    teacher: Any = None
    """The dense model, frozen; None where there is none."""
    teacher_topk: TeacherTopK | None = None
    """The dense model's stored predictions for this pass; there is no teacher then."""

    @property
    def targets_NL(self) -> Tensor:  # noqa: N802  (the shape is part of the name)
        """The token after each place, -100 where none is to be predicted."""
        return nn.functional.pad(self.labels_NL[:, 1:], (0, 1), value=-100)

    def forward(self, **options: Any) -> Any:
        """Call the model; no cache, which would also let packed samples see each other."""
        return self.model(**self.inputs, use_cache=False, **options)

    @torch.no_grad()
    def teach(self, **options: Any) -> Any:
        """Call the teacher on the same tokens."""
        return self.teacher(**self.inputs, use_cache=False, **options)


def objective_names() -> list[str]:
    """Return the names of all objectives, sorted."""
    return OBJECTIVES.names()


def objective_named(name: str) -> Objective:
    """Return an objective by its name.

    Raises:
        HealingError: if there is none of that name.

    Example:
        >>> objective_named("cross_entropy").needs_teacher
        False
    """
    objective = OBJECTIVES.get(name)
    if objective is None:
        raise HealingError(f"heal.objective: {name!r}; allowed {', '.join(objective_names())}.")
    return objective
