"""The block whose outputs are nearest to the dense ones on the calibration tokens.

What counts is E‖W x - B x‖², the distance in the norm of the Gram matrix of the inputs, and not
‖W - B‖: a weight matters as much as its channel fires, and a channel that others can stand in for
need not be seen. Closed forms where there is one (`llmslim.init._closed_forms`); any other linear
structure, the serial `residual` variant among them, is fitted by L-BFGS on the same objective, so a
structure that brings no closed form works too.

The Gram matrix is damped: where the tokens say nothing, the block stays near the weight.

Shapes: I = in_features, O = out_features, G = groups, i = I/G, o = O/G, R = rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import singledispatch

import torch
from torch import Tensor

from llmslim.errors import RecipeError
from llmslim.init._channel_order import learn_order
from llmslim.init._closed_forms import (
    balanced,
    block_shuffle_factors,
    grouped_low_rank_factors,
    io_weight,
    low_rank_factors,
    pivoted_factors,
)
from llmslim.init._gram import stable_cholesky
from llmslim.init.target import Target
from llmslim.modeling.block_shuffle import BlockShuffle
from llmslim.modeling.grouped_low_rank import GroupedLowRank
from llmslim.modeling.grouped_pointwise import GroupedPointwise
from llmslim.modeling.low_rank import LowRank
from llmslim.modeling.pivoted_low_rank import PivotedLowRank
from llmslim.modeling.structured import StructuredLinear

FITS = True
NEEDS_GRAM = True

_LBFGS_STEPS = 100


def fit(block: StructuredLinear, target: Target) -> None:
    """Fill the block so that the outputs' squared error is least, in place.

    Args:
        block: any linear structure.
        target: the dense map, with the Gram matrix of its inputs.

    Raises:
        RecipeError: if the target has no Gram matrix.
    """
    if target.gram_II is None:
        raise RecipeError(
            "init: least_squares without calibration; it fits outputs on real inputs. Give the "
            "recipe a `calibration` section, or use init: project."
        )
    gram_II = _positive_definite(target.gram_II)
    fit_to_gram(block, target.weight_OI.double().cpu(), gram_II, target.seed)


def fit_to_gram(block: StructuredLinear, weight_OI: Tensor, gram_II: Tensor, seed: int) -> None:
    """Fill the block so that tr((W - B) H (W - B)ᵀ) is least, in place.

    Args:
        block: any linear structure.
        weight_OI: W, float64, on the CPU.
        gram_II: H, positive definite, float64, on the CPU.
        seed: of the random weights that a fit without a closed form starts from.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block.reset_parameters()
    _fill(block, weight_OI, gram_II)


def fit_sizes(
    blocks: Sequence[StructuredLinear], weight_OI: Tensor, gram_II: Tensor
) -> Iterator[Tensor]:
    """Yield the dense equivalents, float64, of one structure in several sizes, each fitted.

    Args:
        blocks: linear blocks of float64, on the meta device.
        weight_OI: W, float64.
        gram_II: H, float64.
    """
    ranks = [block.rank for block in blocks if isinstance(block, LowRank | PivotedLowRank)]
    if ranks:  # one factorisation holds those of all lower ranks
        u_OR, v_RI = low_rank_factors(weight_OI, gram_II, max(ranks))
        yield from (u_OR[:, :rank] @ v_RI[:rank] for rank in ranks)
        return
    damped_II = _positive_definite(gram_II)
    for empty in blocks:
        block = empty.to_empty(device="cpu")
        block.reset_buffers()
        fit_to_gram(block, weight_OI.cpu(), damped_II, 0)
        yield block.to_dense().to(weight_OI.device)


def _positive_definite(gram_II: Tensor) -> Tensor:
    """Return H on the CPU, damped as far as it must be to have a Cholesky factor."""
    # float64 on the CPU wherever the block is: GPUs are slow at it, or have none.
    factor_II, _ = stable_cholesky(gram_II.cpu())
    return factor_II @ factor_II.t()


@singledispatch
def _fill(block: StructuredLinear, weight_OI: Tensor, gram_II: Tensor) -> None:
    """Lower the error by L-BFGS from the weights that the block has; for any structure."""
    weight = next(block.parameters())
    dtype, device = weight.dtype, weight.device
    block.to("cpu", torch.float64)  # real Gram matrices are too ill-conditioned for float32
    factor_II, _ = stable_cholesky(gram_II, 0.0)
    rows_II, wanted_IO = factor_II.t().contiguous(), (weight_OI @ factor_II).t()
    scale = wanted_IO.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    weights = [p for p in block.parameters() if p is not block.bias]
    optimizer = torch.optim.LBFGS(weights, max_iter=_LBFGS_STEPS, line_search_fn="strong_wolfe")

    def error() -> Tensor:
        optimizer.zero_grad()
        # Inputs that are the rows of Cᵀ have the Gram matrix C Cᵀ = H.
        loss = (block.product(rows_II) - wanted_IO).square().sum() / scale
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(error)
    block.zero_grad()
    block.to(device, dtype)


@_fill.register
def _fit_grouped(block: GroupedPointwise, weight_OI: Tensor, gram_II: Tensor) -> None:
    if block.variant == "residual":
        _fit_residual(block, weight_OI, gram_II)
        return
    if block.order is not None:
        block.order.copy_(learn_order(weight_OI, gram_II, block.groups)[0])
    order_GS = None if block.order is None else block.order.cpu()
    block.weight.copy_(io_weight(weight_OI, gram_II, block.groups, order_GS)[0])


def _fit_residual(block: GroupedPointwise, weight_OI: Tensor, gram_II: Tensor) -> None:
    """Fit the first part alone in closed form, then descend from there with the second."""
    groups, i = block.groups, block.in_features // block.groups
    rows_GoI = weight_OI.reshape(groups, -1, block.in_features)
    if block.second is None:
        # The block interleaves its output: the rows its groups make are those, put back.
        rows_GoI = rows_GoI.transpose(0, 1).reshape(rows_GoI.shape)
    for g in range(groups):
        seen = slice(g * i, (g + 1) * i)
        factor_ii, lambda_i = stable_cholesky(gram_II[seen, seen], 0.0)
        wanted_oi = rows_GoI[g] @ gram_II[:, seen] + rows_GoI[g, :, seen] * lambda_i
        block.weight[g] = torch.cholesky_solve(wanted_oi.t(), factor_ii)
    if block.second is not None:
        block.second.zero_()
        _fill.dispatch(StructuredLinear)(block, weight_OI, gram_II)


@_fill.register
def _fit_low_rank(block: LowRank, weight_OI: Tensor, gram_II: Tensor) -> None:
    u_OR, v_RI = balanced(*low_rank_factors(weight_OI, gram_II, block.rank))
    block.down.weight.copy_(v_RI)
    block.up.weight.copy_(u_OR)


@_fill.register
def _fit_pivoted(block: PivotedLowRank, weight_OI: Tensor, gram_II: Tensor) -> None:
    u_OR, v_RI = low_rank_factors(weight_OI, gram_II, block.rank)
    pivot_IR, rest, order_O = pivoted_factors(u_OR, v_RI, gram_II)
    block.pivot.weight.copy_(pivot_IR.t())
    block.rest.weight.copy_(rest.t())
    block.order.copy_(order_O)


@_fill.register
def _fit_block_shuffle(block: BlockShuffle, weight_OI: Tensor, gram_II: Tensor) -> None:
    inner = block.inner_features // block.blocks
    first, second, _ = block_shuffle_factors(weight_OI, gram_II, block.blocks, inner)
    block.first.copy_(first)
    block.second.copy_(second)


@_fill.register
def _fit_grouped_low_rank(block: GroupedLowRank, weight_OI: Tensor, gram_II: Tensor) -> None:
    groups, rank, order_GS = block.grouped.groups, block.low_rank.rank, None
    if block.grouped.order is not None:
        # The grouped part sees what the product leaves: that is what its channels are chosen for.
        u_OR, v_RI = low_rank_factors(weight_OI, gram_II, rank)
        order_GS = learn_order(weight_OI - u_OR @ v_RI, gram_II, groups)[0]
        block.grouped.order.copy_(order_GS)
    parameter, u_OR, v_RI, _ = grouped_low_rank_factors(weight_OI, gram_II, groups, rank, order_GS)
    block.grouped.weight.copy_(parameter)
    block.low_rank.down.weight.copy_(v_RI)
    block.low_rank.up.weight.copy_(u_OR)
