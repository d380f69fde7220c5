"""How far a fit follows its targets, and how far the dense weights.

In a slim model a projection's targets are more than the dense projection could give: what the
blocks before it broke is to be repaired as well. Some of that repair can be told from the
projection's inputs; some only seems so on the text at hand, and does harm on other text. So it is
measured: the share of the repair is taken that does best on held-out tokens.

Shapes: I = in_features, O = out_features.
"""

from __future__ import annotations

from torch import Tensor

from llmslim.init import equivalent_target, output_power
from llmslim.surgery.moments import Moments


def corrected_weight(moments: Moments, weight_OI: Tensor, through: Tensor | None = None) -> Tensor:
    """Return the weight that a block is to be nearest to, (O, I), float64.

    Args:
        moments: of the inputs there will be, and of the targets with them.
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
