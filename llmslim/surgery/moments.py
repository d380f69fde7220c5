"""Second moments of activations: of the tokens to fit on, and of those held out.

Shapes: I = in_features, O = out_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmslim.init import GramAccumulator


@dataclass(frozen=True)
class Moments:
    """What a fit looks at, and what it is judged by."""

    fit: GramAccumulator
    held_out: GramAccumulator

    @classmethod
    def of(
        cls, in_features: int, out_features: int | None = None, *, device: torch.device
    ) -> Moments:
        """Return empty ones; arguments as for `GramAccumulator`."""
        judged = out_features is not None
        return cls(
            GramAccumulator(in_features, out_features, device=device),
            GramAccumulator(in_features, out_features, target_moments=judged, device=device),
        )


def target_error(
    block_OI: Tensor, statistics: GramAccumulator, through: Tensor | None = None
) -> float:
    """Return E‖y - B x‖² / E‖y‖² from second moments.

    Args:
        block_OI: B.
        statistics: moments of the inputs x, the targets, and the two together.
        through: maps the targets to y, (O, ·); they are y where None.
    """
    cross, power_OO = statistics.cross_OI, statistics.target_OO
    assert cross is not None
    assert power_OO is not None
    if through is not None:
        full = through.double()
        cross, power_OO = full @ cross, full @ power_OO @ full.t()
    power = float(power_OO.diagonal().sum())
    if power <= 0:
        return 0.0
    explained = 2 * (block_OI * cross).sum() - (block_OI @ statistics.gram_II * block_OI).sum()
    return max(0.0, 1 - float(explained) / power)
