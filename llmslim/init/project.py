"""The block nearest to the dense weight in Frobenius norm; needs no data.

Closed forms where there is one: `io` keeps the dense entries under its mask, `low_rank` is the
truncated singular value decomposition (Eckart and Young 1936), `pivoted_low_rank` the same matrix;
`block_shuffle` and `grouped_low_rank` alternate closed forms, as `least_squares` does for white
input. A learned channel order keeps the entries of most weight. Any other linear structure, the
serial `residual` variant among them, is fitted by L-BFGS on the same objective, so a structure
that brings no closed form works too.

Small weights move outputs as much as large ones where inputs are large: a nearest matrix is not
the nearest map, and a grouped block filled this way needs healing before it says anything.

Shapes: I = in_features, O = out_features, G = groups, i = I/G, o = O/G, R = rank.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from llmslim.init import least_squares
from llmslim.init._channel_order import order_by_value
from llmslim.init.target import Target
from llmslim.modeling.block_shuffle import BlockShuffle
from llmslim.modeling.grouped_low_rank import GroupedLowRank
from llmslim.modeling.grouped_pointwise import GroupedPointwise
from llmslim.modeling.low_rank import LowRank
from llmslim.modeling.pivoted_low_rank import PivotedLowRank
from llmslim.modeling.structured import StructuredLinear

FITS = True

_LBFGS_STEPS = 60


def fit(block: StructuredLinear, target: Target) -> None:
    """Fill the block so that ‖W - B‖ is least, in place.

    Args:
        block: any linear structure.
        target: the dense map.
    """
    _project(block, target.weight_OI, target.seed)


@singledispatch
def _project(block: StructuredLinear, weight_OI: Tensor, seed: int) -> None:
    """Minimise by L-BFGS, from the block's own random start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block.reset_parameters()
    dtype = next(block.parameters()).dtype
    block.to(weight_OI.dtype)
    identity = torch.eye(block.in_features).to(weight_OI)
    scale = weight_OI.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    optimizer = torch.optim.LBFGS(
        block.parameters(), max_iter=_LBFGS_STEPS, line_search_fn="strong_wolfe"
    )

    def error() -> Tensor:
        optimizer.zero_grad()
        loss = (block.product(identity).t() - weight_OI).square().sum() / scale
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(error)
    block.zero_grad()
    block.to(dtype)


@_project.register
def _project_grouped(block: GroupedPointwise, weight_OI: Tensor, seed: int) -> None:
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
    if block.variant == "residual":
        if block.second is None:
            # The block interleaves its output: the rows its groups make are those, put back.
            rows = w_GoI.transpose(0, 1).reshape(groups, o, groups, i)
            block.weight.copy_(rows[each, :, each].transpose(1, 2))
        else:
            _project.dispatch(StructuredLinear)(block, weight_OI, seed)
        return
    # Residue class g modulo G: (G, o, i, G) at [g, :, :, g].
    second = w_GoI.reshape(groups, o, i, groups)[each, :, :, each]  # (G, o, i)
    # A channel in both sets is seen twice; half the weight on each side adds up to all of it.
    channels = torch.arange(block.in_features, device=weight_OI.device)
    shared = channels // i == channels % groups  # (I,) for the one group both names point to
    first = torch.where(shared.reshape(groups, 1, i), first / 2, first)
    second = torch.where(shared.reshape(i, groups).t().reshape(groups, 1, i), second / 2, second)
    block.weight.copy_(torch.cat((first, second), dim=2).transpose(1, 2))


@_project.register
def _project_low_rank(block: LowRank, weight_OI: Tensor, seed: int) -> None:  # noqa: ARG001
    u_OK, s_K, v_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    root = s_K[: block.rank].sqrt()  # shared between the factors: both train at one scale
    block.down.copy_(v_KI[: block.rank].t() * root)
    block.up.copy_((u_OK[:, : block.rank] * root).t())


@_project.register(PivotedLowRank)
@_project.register(BlockShuffle)
@_project.register(GroupedLowRank)
def _project_for_white_input(block: StructuredLinear, weight_OI: Tensor, seed: int) -> None:
    white_II = torch.eye(block.in_features, dtype=torch.float64)
    least_squares.fit_to_gram(block, weight_OI.double().cpu(), white_II, seed)
