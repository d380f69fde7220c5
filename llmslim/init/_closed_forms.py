"""Blocks nearest to a weight in the norm of a Gram matrix, in closed form or by a chain of them.

Every function takes a weight W (O, I) and a positive definite H (I, I), float64, and returns the
parameters of the block B for which tr((W - B) H (W - B)ᵀ) is least:

- io: every output group is regressed on the channels it sees, W H[:, S] H[S, S]⁻¹;
- low rank: with H = C Cᵀ the norm is ‖W C - B C‖, so B C is the truncated singular value
  decomposition of W C (Eckart and Young 1936). Only its left vectors U are needed: B = U Uᵀ W;
- pivoted low rank: the same matrix, its rows as combinations of R of them;
- block shuffle: a grid of low-rank blocks, each fitted to its part of W, and then in turn to what
  the others leave;
- grouped low rank: io and low rank, each fitted in turn to what the other leaves.

Each step of the last two is the exact minimum for its part, so the error never rises.

Shapes: I, O, G = groups, i = I/G, o = O/G, R = rank, S = channels of a group, B = blocks,
m = inner channels of a block.
"""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

from llmslim.init._gram import output_power, stable_cholesky

_SWEEPS = 6
_ENOUGH = 1e-3
"""An alternation ends where a sweep lowers the error by less than this share of it."""
_ROUNDING = 1e-9
"""Damping of a submatrix of a matrix that is positive definite already."""


def io_channels(in_features: int, groups: int) -> list[Tensor]:
    """Return the positions that each output group of an `io` block sees, ascending.

    Example:
        >>> [channels.tolist() for channels in io_channels(6, 2)]
        [[0, 1, 2, 4], [1, 3, 4, 5]]
    """
    position_I = torch.arange(in_features)
    block_I, residue_I = position_I // (in_features // groups), position_I % groups
    return [position_I[(block_I == g) | (residue_I == g)] for g in range(groups)]


def io_weight(
    weight_OI: Tensor, gram_II: Tensor, groups: int, order_GS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fit an `io` block.

    Args:
        weight_OI: W.
        gram_II: H.
        groups: G.
        order_GS: channels of each group, all different; those of `io` where not given.

    Returns:
        The block's parameter (G, 2i, o), or (1, I, O) for one group, and its matrix (O, I).
    """
    out_features, in_features = weight_OI.shape
    i, o = in_features // groups, out_features // groups
    dense_OI = torch.zeros_like(weight_OI)
    if groups == 1:
        return weight_OI.t()[None].clone(), weight_OI.clone()
    parameter = weight_OI.new_zeros(groups, 2 * i, o)
    cross_OI = weight_OI @ gram_II
    for g, seen in enumerate(io_channels(in_features, groups)):
        rows = slice(g * o, (g + 1) * o)
        channels = seen if order_GS is None else order_GS[g]
        factor_SS, lambda_S = stable_cholesky(gram_II[channels][:, channels], _ROUNDING)
        # What is added to H pulls towards W: a matrix that the block can hold stays as it is.
        wanted_oS = cross_OI[rows][:, channels] + weight_OI[rows][:, channels] * lambda_S
        fit_So = torch.cholesky_solve(wanted_oS.t(), factor_SS)
        dense_OI[rows, channels] = fit_So.t()
        if order_GS is not None:
            parameter[g] = fit_So
            continue
        in_block, in_class = seen // i == g, seen % groups == g
        # A channel in both sets is seen twice; half the weight on each side adds up to all of it.
        fit_So = torch.where((in_block & in_class)[:, None], fit_So / 2, fit_So)
        parameter[g, seen[in_block] - g * i] = fit_So[in_block]
        parameter[g, i + seen[in_class] // groups] = fit_So[in_class]
    return parameter, dense_OI


def low_rank_factors(
    weight_OI: Tensor, gram_II: Tensor, rank: int, factor_II: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fit a product of rank R.

    Args:
        weight_OI: W.
        gram_II: H.
        rank: R.
        factor_II: Cholesky factor of H, where the caller has it already.

    Returns:
        U (O, R) with orthonormal columns and V (R, I), V H Vᵀ diagonal; the strongest first.
    """
    # Eigenvectors of the smaller square are far cheaper than a singular value decomposition.
    if weight_OI.shape[0] <= weight_OI.shape[1]:
        square = weight_OI @ gram_II @ weight_OI.t()
        u_OR = torch.linalg.eigh(square).eigenvectors.flip(1)[:, :rank]
    else:
        if factor_II is None:
            factor_II = stable_cholesky(gram_II, _ROUNDING)[0]
        whitened_OI = weight_OI @ factor_II
        right_IR = torch.linalg.eigh(whitened_OI.t() @ whitened_OI).eigenvectors.flip(1)[:, :rank]
        u_OR = torch.linalg.qr(whitened_OI @ right_IR).Q
    return u_OR, u_OR.t() @ weight_OI


def balanced(u_OR: Tensor, v_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same product with its scale shared between the factors: both train at one."""
    root_R = v_RI.norm(dim=1).sqrt()
    safe_R = root_R.where(root_R > 0, torch.ones_like(root_R))
    return u_OR * root_R, v_RI / safe_R[:, None]


def pivoted_factors(u_OR: Tensor, v_RI: Tensor, gram_II: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write U V as R of its rows and how the other rows are made of them; nothing is lost.

    The pivots come from QR with column pivoting, so outputs of much power are taken first and the
    coefficients of the others stay small: bfloat16 loses no more than in two thin factors.

    Args:
        u_OR: U, orthonormal columns.
        v_RI: V, V H Vᵀ diagonal.
        gram_II: H.

    Returns:
        `pivot` (I, R), `rest` (R, O - R) and `order` (O,) of a PivotedLowRank.
    """
    out_features, rank = u_OR.shape
    strength_R = (v_RI @ gram_II * v_RI).sum(1).clamp_min(0).sqrt()
    rows_RO = (u_OR * strength_R).t()
    triangle, permutation = scipy.linalg.qr(rows_RO.cpu().numpy(), mode="r", pivoting=True)
    triangle_RO = torch.from_numpy(triangle).to(u_OR)
    row_O = torch.from_numpy(permutation).to(u_OR.device, torch.int64)
    # A matrix of less than rank R needs fewer pivots; the rest of the triangle is rounding.
    diagonal_R = triangle_RO.diagonal().abs()
    k = int((diagonal_R > 1e-12 * diagonal_R.max()).sum())
    rest = u_OR.new_zeros(rank, out_features - rank)
    rest[:k] = torch.linalg.solve_triangular(
        triangle_RO[:k, :k], triangle_RO[:k, rank:], upper=True
    )
    order_O = torch.empty_like(row_O)
    order_O[row_O] = torch.arange(out_features, device=row_O.device)
    return (u_OR[row_O[:rank]] @ v_RI).t(), rest, order_O


def block_shuffle_factors(
    weight_OI: Tensor, gram_II: Tensor, blocks: int, inner: int, *, sweeps: int = _SWEEPS
) -> tuple[Tensor, Tensor, list[float]]:
    """Fit a block shuffle.

    Args:
        weight_OI: W.
        gram_II: H.
        blocks: B.
        inner: m, inner channels of a block.
        sweeps: how often at most every block is fitted.

    Returns:
        `first` (B, I/B, m) and `second` (B, m, O/B), and the squared error after each sweep.
    """
    out_features, in_features = weight_OI.shape
    i, o = in_features // blocks, out_features // blocks
    columns = [slice(b * i, (b + 1) * i) for b in range(blocks)]
    factors = [stable_cholesky(gram_II[c, c], _ROUNDING)[0] for c in columns]
    first = weight_OI.new_zeros(blocks, i, inner)
    second = weight_OI.new_zeros(blocks, inner, o)
    # Inner channel j of input block b stands at j B + b after the shuffle.
    position_Bm = torch.arange(blocks)[:, None] + torch.arange(inner) * blocks
    left_OI = weight_OI.clone()

    def put(b: int, wanted_Oi: Tensor) -> None:
        seen = columns[b]
        for c in range(blocks):
            rows = slice(c * o, (c + 1) * o)
            slot_K = torch.nonzero(position_Bm[b] // inner == c).flatten()
            k = min(len(slot_K), i, o)
            u_ok, v_ki = balanced(
                *low_rank_factors(wanted_Oi[rows], gram_II[seen, seen], k, factors[b])
            )
            first[b][:, slot_K[:k]] = v_ki.t()
            second[c][position_Bm[b, slot_K[:k]] % inner] = u_ok.t()
            left_OI[rows, seen] = weight_OI[rows, seen] - u_ok @ v_ki

    # Begun with each block fitted to its own part of W: where all have the rank for it, that is W.
    # From nothing, the first block would take over what only the others can do.
    for b, seen in enumerate(columns):
        put(b, weight_OI[:, seen])
    errors = [output_power(left_OI, gram_II)]
    for _ in range(sweeps):
        for b, seen in enumerate(columns):
            fit_Oi = weight_OI[:, seen] - left_OI[:, seen]
            # What these columns should be, given all others: left over, seen through x[b].
            cross_Oi = left_OI @ gram_II[:, seen]
            put(b, fit_Oi + torch.cholesky_solve(cross_Oi.t(), factors[b]).t())
        errors.append(output_power(left_OI, gram_II))
        if errors[-1] > (1 - _ENOUGH) * errors[-2]:
            break
    return first, second, errors[1:]


def grouped_low_rank_factors(
    weight_OI: Tensor,
    gram_II: Tensor,
    groups: int,
    rank: int,
    order_GS: Tensor | None = None,
    *,
    sweeps: int = _SWEEPS,
) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """Fit a grouped block and a product of rank R, added.

    Args:
        weight_OI: W.
        gram_II: H.
        groups: G.
        rank: R.
        order_GS: channels of each group of the grouped part.
        sweeps: how often at most both parts are fitted.

    Returns:
        The grouped parameter (G, 2i, o), U (O, R), V (R, I), and the squared error after each
        sweep.
    """
    factor_II = stable_cholesky(gram_II, _ROUNDING)[0]
    grouped_OI, errors = torch.zeros_like(weight_OI), [output_power(weight_OI, gram_II)]
    for _ in range(sweeps):
        u_OR, v_RI = low_rank_factors(weight_OI - grouped_OI, gram_II, rank, factor_II)
        left_OI = weight_OI - u_OR @ v_RI
        grouped, grouped_OI = io_weight(left_OI, gram_II, groups, order_GS)
        errors.append(output_power(left_OI - grouped_OI, gram_II))
        if errors[-1] > (1 - _ENOUGH) * errors[-2]:
            break
    return grouped, *balanced(u_OR, v_RI), errors[1:]
