"""Choose which neurons of an MLP to keep, and refit the projection that reads them.

The output of an MLP is B a, B the down projection and a the neurons' activations with Gram matrix
H. Leaving out neuron j and refitting the rest costs exactly

    ‖B_j‖² / (H⁻¹)_jj

(the optimal brain surgeon's score, with the refit included). Neurons are removed a few at a time,
and both B and H⁻¹ are updated in between, so later choices take earlier ones into account and the
remaining B is the refit.

Shapes: M = neurons, A = neurons still in the matrices, K = kept neurons, Q = those removed next,
O = outputs of the down projection.
Source: Hassibi and Stork 1993, "Optimal Brain Surgeon"; Frantar and Alistarh 2022, "Optimal Brain
Compression", arXiv:2208.11580, for the downdates.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from llmslim.init import stable_cholesky

_AT_A_TIME = 16
"""Neurons removed between two updates; one at a time is exact and 16 times slower."""
_DEAD_SHARE = 1 / 8
"""Share of the matrices that may belong to removed neurons before they are copied without them."""


class Narrowed(NamedTuple):
    """The neurons that are kept, and the projection that reads them."""

    kept_K: Tensor
    """Ascending."""
    weight_OK: Tensor
    """The weight on them that minimises the damped error of the old outputs; float64."""

    def whole(self, neurons: int) -> Tensor:
        """Return the weight as one that reads all of them, (O, M)."""
        weight_OM = self.weight_OK.new_zeros(len(self.weight_OK), neurons)
        weight_OM[:, self.kept_K] = self.weight_OK
        return weight_OM


@torch.no_grad()
def eliminate(target_OM: Tensor, gram_MM: Tensor, widths: Iterable[int]) -> dict[int, Narrowed]:
    """Remove an MLP's neurons, those first whose loss costs least.

    Args:
        target_OM: what the down projection should be, (O, M).
        gram_MM: Gram matrix of its inputs.
        widths: numbers of neurons to keep, 1 to M; each gives one result.

    Returns:
        The result for each width.
    """
    inverse_AA = torch.cholesky_inverse(stable_cholesky(gram_MM)[0])
    weight_OA = target_OM.double().clone()
    alive_A = torch.ones(weight_OA.shape[1], dtype=torch.bool, device=weight_OA.device)
    name_A = torch.arange(len(alive_A), device=weight_OA.device)
    left = len(alive_A)
    found: dict[int, Narrowed] = {}
    for width in sorted(set(widths), reverse=True):
        while left > width:
            score_A = weight_OA.square().sum(0) / inverse_AA.diagonal().clamp_min(1e-300)
            count = min(_AT_A_TIME, left - width)
            gone_Q = score_A.where(alive_A, torch.inf).topk(count, largest=False).indices
            factor_QQ, _ = stable_cholesky(inverse_AA[gone_Q][:, gone_Q], 0.0)
            half_QA = torch.linalg.solve_triangular(factor_QQ, inverse_AA[gone_Q], upper=False)
            half_QO = torch.linalg.solve_triangular(
                factor_QQ, weight_OA[:, gone_Q].t(), upper=False
            )
            weight_OA.addmm_(half_QO.t(), half_QA, alpha=-1)
            inverse_AA.addmm_(half_QA.t(), half_QA, alpha=-1)
            alive_A[gone_Q] = False
            left -= count
            if left < (1 - _DEAD_SHARE) * len(alive_A):
                rest_R = alive_A.nonzero()[:, 0]
                inverse_AA, weight_OA = inverse_AA[rest_R][:, rest_R], weight_OA[:, rest_R]
                name_A, alive_A = name_A[rest_R], alive_A[rest_R]
        found[width] = Narrowed(name_A[alive_A], weight_OA[:, alive_A])
    return found
