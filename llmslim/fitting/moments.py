"""Second moments of activations, and the weight that a block is fitted to.

In a slim model a projection's targets are more than the dense projection could give: what the
blocks before it broke is to be repaired as well. Part of that repair follows from the projection's
inputs; part only seems to on the calibration text, and does harm on other text. So the step towards
the repair is shrunk to the share that does best on held-out tokens.

Shapes: I = in_features, O = out_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmslim.init import GramAccumulator, equivalent_target, output_power


@dataclass(frozen=True)
class Moments:
    """Moments of the tokens to fit on, and of those held out to measure errors."""

    fit: GramAccumulator
    held_out: GramAccumulator

    @classmethod
    def of(
        cls, in_features: int, out_features: int | None = None, *, device: torch.device
    ) -> Moments:
        """Return empty moments; arguments as for `GramAccumulator`."""
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


def corrected_weight(moments: Moments, weight_OI: Tensor, through: Tensor | None = None) -> Tensor:
    """Return the weight that a block is fitted to, (O, I), float64.

    Args:
        moments: of the inputs in the slim model, and of the targets with them.
        weight_OI: the dense weight.
        through: maps the moments' targets to outputs, (O, ·); they are outputs where None.
    """
    weight_OI = weight_OI.double()

    def cross_of(side: Tensor | None) -> Tensor:
        assert side is not None
        return side if through is None else through.double() @ side

    fit, held_out = moments.fit, moments.held_out
    full_OI = equivalent_target(cross_of(fit.cross_OI), fit.gram_II, weight_OI)
    if held_out.tokens == 0:
        return full_OI
    # The held-out error of the dense weight and a share of the step is a parabola in the share.
    step_OI, gram_II = full_OI - weight_OI, held_out.gram_II
    slope = float((step_OI * (cross_of(held_out.cross_OI) - weight_OI @ gram_II)).sum())
    curve = output_power(step_OI, gram_II)
    share = min(max(slope / curve, 0.0), 1.0) if curve > 0 else 0.0
    return weight_OI + share * step_OI
