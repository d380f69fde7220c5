"""Choose which neurons of an MLP stay, and refit the projection that reads them.

The output of an MLP is B a, B the down projection and a the neurons' activations with Gram matrix
H. Leaving out neuron j and refitting the rest costs exactly

    ‖B_j‖² / (H⁻¹)_jj

(the optimal brain surgeon's score, with the refit included). Neurons go a few at a time, and both
B and H⁻¹ are brought up to date in between, so a later choice knows what is already gone.

Shapes: M = neurons, K = kept neurons, O = outputs of the down projection.
Source: Hassibi and Stork 1993, "Optimal Brain Surgeon"; Frantar and Alistarh 2022, "Optimal Brain
Compression", arXiv:2208.11580, for the downdates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmslim.init import stable_cholesky

_AT_A_TIME = 16
"""Neurons that go between two updates; one at a time is exact and 16 times slower."""


@dataclass(frozen=True)
class Elimination:
    """Every neuron in the order it goes, and what that costs."""

    order_M: Tensor
    """Neurons, first to go first."""
    cost_M: Tensor
    """Added squared output error once the first n + 1 are gone, refit included."""

    def kept(self, count: int) -> Tensor:
        """Return the `count` neurons that go last, ascending."""
        return self.order_M[len(self.order_M) - count :].sort().values

    def cost(self, count: int) -> float:
        """Return the added error of keeping `count` neurons."""
        gone = len(self.order_M) - count
        return float(self.cost_M[gone - 1]) if gone else 0.0


@torch.no_grad()
def eliminate(target_OM: Tensor, gram_MM: Tensor, *, down_to: int = 0) -> Elimination:
    """Order an MLP's neurons by how little their loss costs.

    Args:
        target_OM: what the down projection should be, (O, M).
        gram_MM: Gram matrix of its inputs.
        down_to: stop when this many are left; they come last, in no order.
    """
    factor_MM, _ = stable_cholesky(gram_MM)
    inverse_AA = torch.cholesky_inverse(factor_MM)
    weight_OA = target_OM.double().clone()
    alive_A = torch.arange(weight_OA.shape[1], device=weight_OA.device)
    order, costs, total = [], [], weight_OA.new_zeros(())
    while len(alive_A) > down_to:
        score_A = weight_OA.square().sum(0) / inverse_AA.diagonal().clamp_min(1e-300)
        count = min(_AT_A_TIME, len(alive_A) - down_to)
        gone_Q = score_A.topk(count, largest=False).indices
        rest_A = torch.ones(len(alive_A), dtype=torch.bool, device=alive_A.device)
        rest_A[gone_Q] = False
        factor_QQ, _ = stable_cholesky(inverse_AA[gone_Q][:, gone_Q], 0.0)
        half_QA = torch.linalg.solve_triangular(factor_QQ, inverse_AA[gone_Q], upper=False)
        loss_QO = torch.linalg.solve_triangular(factor_QQ, weight_OA[:, gone_Q].t(), upper=False)
        costs.append(total + loss_QO.square().sum(1).cumsum(0))
        total = costs[-1][-1]
        order.append(alive_A[gone_Q])
        half_QR = half_QA[:, rest_A]
        weight_OA = weight_OA[:, rest_A] - loss_QO.t() @ half_QR
        inverse_AA = inverse_AA[rest_A][:, rest_A].addmm_(half_QR.t(), half_QR, alpha=-1.0)
        alive_A = alive_A[rest_A]
    order.append(alive_A)
    costs.append(total.expand(len(alive_A)))
    return Elimination(torch.cat(order), torch.cat(costs))


@torch.no_grad()
def refit(target_OM: Tensor, gram_MM: Tensor, kept_K: Tensor) -> Tensor:
    """Return the best (O, K) weight on the kept neurons: W H[:, K] H[K, K]⁻¹, damped; float64."""
    gram_MK = gram_MM.double()[:, kept_K]
    factor_KK, damped_K = stable_cholesky(gram_MK[kept_K])
    target = target_OM.double()
    right_OK = target @ gram_MK + target[:, kept_K] * damped_K
    return torch.cholesky_solve(right_OK.t(), factor_KK).t()
