"""The block nearest to the dense weight in Frobenius norm; needs no data.

Two structures have short ways: `io` keeps the dense entries under its mask, or with a learned
channel order those of most weight, and `low_rank` is the truncated singular value decomposition
(Eckart and Young 1936). All others are fitted as `least_squares` fits them to white input.

Small weights move outputs as much as large ones where inputs are large: a nearest matrix is not
the nearest map, and a grouped block filled this way needs healing before it writes any sense.

Shapes: I = in_features, O = out_features, G = groups, i = I/G, o = O/G, R = rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmslim.init import least_squares
from llmslim.init._channel_order import order_by_value
from llmslim.init.target import Target
from llmslim.modeling.grouped_pointwise import GroupedPointwise
from llmslim.modeling.low_rank import LowRank
from llmslim.modeling.structured import StructuredLinear

FITS = True


def fit(block: StructuredLinear, target: Target) -> None:
    """Fill the block so that ‖W - B‖ is least, in place.

    Args:
        block: any linear structure.
        target: the dense map.
    """
    weight_OI = target.weight_OI
    if isinstance(block, LowRank):
        u_OK, s_K, v_KI = torch.linalg.svd(weight_OI, full_matrices=False)
        root = s_K[: block.rank].sqrt()  # shared between the factors: both train at one scale
        block.down.weight.copy_(v_KI[: block.rank] * root[:, None])
        block.up.weight.copy_(u_OK[:, : block.rank] * root)
    elif isinstance(block, GroupedPointwise) and block.variant == "io":
        _fit_io(block, weight_OI)
    else:
        white_II = torch.eye(block.in_features, dtype=torch.float64)
        least_squares.fit_to_gram(block, weight_OI.double().cpu(), white_II, target.seed)


def _fit_io(block: GroupedPointwise, weight_OI: Tensor) -> None:
    groups = block.groups
    i, o = block.in_features // groups, block.out_features // groups
    if block.order is not None:
        rows_GIo = weight_OI.reshape(groups, o, block.in_features).transpose(1, 2)
        block.order.copy_(order_by_value(rows_GIo.square().sum(2)))
        for g, channels in enumerate(block.order):
            block.weight[g] = rows_GIo[g, channels]
        return
    w_GoI = weight_OI.reshape(groups, o, block.in_features)
    if groups == 1:
        block.weight.copy_(w_GoI.transpose(1, 2))
        return
    each = torch.arange(groups, device=weight_OI.device)
    # Contiguous block g of the input: (G, o, G, i) at [g, :, g, :].
    first = w_GoI.reshape(groups, o, groups, i)[each, :, each]  # (G, o, i)
    # Residue class g modulo G: (G, o, i, G) at [g, :, :, g].
    second = w_GoI.reshape(groups, o, i, groups)[each, :, :, each]  # (G, o, i)
    # A channel in both sets is seen twice; half the weight on each side adds up to all of it.
    channels = torch.arange(block.in_features, device=weight_OI.device)
    shared = channels // i == channels % groups  # (I,) for the one group both names point to
    first = torch.where(shared.reshape(groups, 1, i), first / 2, first)
    second = torch.where(shared.reshape(i, groups).t().reshape(groups, 1, i), second / 2, second)
    block.weight.copy_(torch.cat((first, second), dim=2).transpose(1, 2))
