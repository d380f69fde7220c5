"""Which channels each group of an `io` block sees, and which outputs share a group if free.

With `channel_order: learned` every output group chooses the 2i channels it regresses on. The
best choice is combinatorial: channels stand in for each other. So each group chooses again and
again the channels worth most to it, each by what the regression would lose without it, or gain if
it came in, given all others; moves are damped where a round made things worse, and the best choice
seen is kept. Groups choose independently: a channel that all need is seen by all.

Outputs, where they may be renumbered too (the neurons of an MLP), are assigned in between: what a
group's channels explain of every output is exact.

Shapes: I = in_features, O = out_features, G = groups, i = I/G, o = O/G, S = 2i channels of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmslim.init._closed_forms import io_channels
from llmslim.init._gram import stable_cholesky

_ROUNDS = 10
_SWEEPS = 10
_PRICE_STEPS = 20
_ROUNDING = 1e-9


def order_by_value(value_GI: Tensor) -> Tensor:
    """Return the 2i channels worth most to each group, (G, S), ascending.

    Args:
        value_GI: what each channel is worth to each group.
    """
    groups, in_features = value_GI.shape
    seen = in_features if groups == 1 else 2 * (in_features // groups)
    return value_GI.topk(seen, dim=1).indices.sort(dim=1).values


def learn_order(
    weight_OI: Tensor, gram_II: Tensor, groups: int, *, rounds: int = _ROUNDS
) -> tuple[Tensor, float]:
    """Return which channels each group should see, and the best block's error with them.

    Args:
        weight_OI: W, float64.
        gram_II: H, positive definite, float64.
        groups: G.
        rounds: how often at most a group chooses.

    Returns:
        The order (G, S), never worse than a fixed one, and the relative squared error.
    """
    cross_OI = weight_OI @ gram_II
    power = float((cross_OI * weight_OI).sum())
    lost_I = _lost_alone(gram_II)
    own = io_channels(weight_OI.shape[1], groups)
    order, explained = [], 0.0
    for g, rows in enumerate(torch.arange(len(weight_OI)).chunk(groups)):
        value_I = weight_OI[rows].square().sum(0) * lost_I
        mine_I = value_I.index_fill(0, own[g], float("inf"))
        starts = [
            _Regression(cross_OI[rows], gram_II, order_by_value(start_GI)[g])
            for start_GI in (value_I.expand(groups, -1), mine_I.expand(groups, -1))
        ]
        best = _choose(max(starts, key=lambda start: start.explained), rounds)
        order.append(best.channels_S)
        explained += best.explained
    return torch.stack(order), max(power - explained, 0.0) / power if power > 0 else 0.0


def learn_outputs(
    weight_PMI: Tensor, gram_II: Tensor, groups: int, *, sweeps: int = _SWEEPS
) -> Tensor:
    """Return an order of free outputs in which those of a group can do with the same channels.

    Args:
        weight_PMI: maps that share their M outputs' order, as gate and up share the neurons, and
            each choose their own channels; the caller renumbers the outputs of all alike. float64.
        gram_II: H of their common input, positive definite, float64.
        groups: G.
        sweeps: how often at most channels and outputs are chosen in turn.

    Returns:
        The output that stands at each position, (M,); as they were if nothing better was found.
    """
    _, outputs, in_features = weight_PMI.shape
    as_is_M = torch.arange(outputs)
    if groups == 1:
        return as_is_M
    cross_PMI = weight_PMI @ gram_II
    lost_I = _lost_alone(gram_II)

    def choose(outputs_M: Tensor, order_PGS: Tensor) -> list[list[_Regression]]:
        return _choose_each(cross_PMI[:, outputs_M], gram_II, order_PGS)

    def start(outputs_M: Tensor) -> Tensor:
        worth_PMI = (weight_PMI.square() * lost_I)[:, outputs_M]
        worth_PGI = worth_PMI.reshape(len(weight_PMI), groups, -1, in_features).sum(2)
        return torch.stack([order_by_value(worth_GI) for worth_GI in worth_PGI])

    def explained_by(chosen: list[list[_Regression]]) -> float:
        return sum(group.explained for part in chosen for group in part)

    best_M = as_is_M
    best = explained_by(choose(as_is_M, start(as_is_M))) * (1 + _ROUNDING)
    needs_MI = (weight_PMI * lost_I.sqrt()).transpose(0, 1).reshape(outputs, -1)
    outputs_M = _cluster(needs_MI, groups)
    order_PGS, last = start(outputs_M), 0.0
    for _ in range(sweeps):
        chosen = choose(outputs_M, order_PGS)
        order_PGS = torch.stack(
            [torch.stack([group.channels_S for group in part]) for part in chosen]
        )
        explained = explained_by(chosen)
        if explained > best:
            best, best_M = explained, outputs_M
        if explained < (1 + 1e-3) * last:
            break
        last = explained
        worth_PMG = torch.stack(
            [
                torch.stack([group.explains(cross_MI) for group in part], dim=1)
                for cross_MI, part in zip(cross_PMI, chosen, strict=True)
            ]
        )
        outputs_M = _assign(worth_PMG.sum(0), as_is_M // (outputs // groups))
    return best_M


def _choose_each(cross_PMI: Tensor, gram_II: Tensor, order_PGS: Tensor) -> list[list[_Regression]]:
    """Let every group of every map choose its channels, beginning with an order."""
    groups = order_PGS.shape[1]
    return [
        [
            _choose(_Regression(cross_oI, gram_II, channels_S), 2)
            for cross_oI, channels_S in zip(cross_MI.chunk(groups), order_GS, strict=True)
        ]
        for cross_MI, order_GS in zip(cross_PMI, order_PGS, strict=True)
    ]


class _Regression:
    """Some outputs regressed on some channels."""

    def __init__(self, cross_oI: Tensor, gram_II: Tensor, channels_S: Tensor) -> None:
        self.cross_oI, self.gram_II, self.channels_S = cross_oI, gram_II, channels_S
        rows_SI = gram_II[channels_S]
        self.factor_SS = stable_cholesky(rows_SI[:, channels_S], _ROUNDING)[0]
        self.half_So: Tensor = torch.linalg.solve_triangular(
            self.factor_SS, cross_oI[:, channels_S].t(), upper=False
        )
        self.explained = float(self.half_So.square().sum())

    def explains(self, cross_OI: Tensor) -> Tensor:
        """Return how much of each output these channels explain, (O,)."""
        cross_SO = cross_OI[:, self.channels_S].t()
        half_SO: Tensor = torch.linalg.solve_triangular(self.factor_SS, cross_SO, upper=False)
        return half_SO.square().sum(0)

    def gains(self) -> Tensor:
        """Return what each channel is worth given the others, (I,)."""
        power_I = self.gram_II.diagonal()
        half_SI = torch.linalg.solve_triangular(
            self.factor_SS, self.gram_II[self.channels_S], upper=False
        )
        # A channel not seen: what is left of the outputs along the part of it that is new.
        left_oI = self.cross_oI - self.half_So.t() @ half_SI
        new_I = (power_I - half_SI.square().sum(0)).clamp_min(1e-4 * power_I)
        gain_I: Tensor = left_oI.square().sum(0) / new_I
        # One that is seen: the rise of the regression's error without it.
        fit_So = torch.linalg.solve_triangular(self.factor_SS.t(), self.half_So, upper=True)
        inverse_S = torch.cholesky_inverse(self.factor_SS).diagonal()
        gain_I[self.channels_S] = fit_So.square().sum(1) / inverse_S
        return gain_I


def _choose(best: _Regression, rounds: int) -> _Regression:
    """Exchange channels for better ones, in several rounds; never worse than the start."""
    gain_I, stay = best.gains(), 0.0
    for _ in range(rounds):
        while True:
            bonus_I = torch.ones_like(gain_I)
            bonus_I[best.channels_S] += stay
            wanted_S = (gain_I * bonus_I).topk(len(best.channels_S)).indices.sort().values
            if stay < 0.01 or not torch.equal(wanted_S, best.channels_S):
                break
            stay /= 2
        if torch.equal(wanted_S, best.channels_S):
            break
        tried = _Regression(best.cross_oI, best.gram_II, wanted_S)
        if tried.explained > best.explained:
            # The mean of what channels were worth lately: worth alone makes rounds swing.
            best, gain_I, stay = tried, (gain_I + tried.gains()) / 2, 0.7 * stay
        else:
            stay = max(2 * stay, 0.5)
    return best


def _lost_alone(gram_II: Tensor) -> Tensor:
    """Return the power of each channel that no other can stand in for, (I,)."""
    return 1 / torch.cholesky_inverse(stable_cholesky(gram_II, _ROUNDING)[0]).diagonal()


def _cluster(needs_OI: Tensor, groups: int, rounds: int = 8) -> Tensor:
    """Return an order of outputs in which each group needs much the same channels.

    Balanced k-means on how each output's needs are spread over the channels.
    """
    spread_OI = needs_OI.abs()
    spread_OI = spread_OI / spread_OI.norm(dim=1, keepdim=True).clamp_min(1e-300)
    out_features = len(spread_OI)
    # The output farthest from those taken starts the next group: no draw, and no empty group.
    centres = [0]
    nearest_O = spread_OI @ spread_OI[0]
    for _ in range(groups - 1):
        centres.append(int(nearest_O.argmin()))
        nearest_O = torch.maximum(nearest_O, spread_OI @ spread_OI[centres[-1]])
    centre_GI = spread_OI[centres]
    group_O = torch.arange(out_features) // (out_features // groups)
    for _ in range(rounds):
        likeness_OG = spread_OI @ centre_GI.t()
        order_O = _assign(likeness_OG, group_O)
        centre_GI = spread_OI[order_O].reshape(groups, -1, spread_OI.shape[1]).mean(1)
        centre_GI = centre_GI / centre_GI.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return order_O


def _assign(worth_NK: Tensor, kind_N: Tensor) -> Tensor:
    """Return who stands at each position so that the sum of worth is large, (N,).

    Positions of one kind are worth the same, and there are many of each: solvers for unlike
    positions take seconds over those ties. Here every kind gets a price at which about as many want
    it as it has room for (Sinkhorn's iteration, colder and colder), then the surest choose first.

    Args:
        worth_NK: what a position of each kind is worth to each candidate.
        kind_N: kind of each position, all K kinds occurring.
    """
    room_K = torch.bincount(kind_N)
    spread = (worth_NK.amax(1) - worth_NK.amin(1)).mean().clamp_min(1e-300)
    worth_NK = worth_NK / spread
    price_K = torch.zeros_like(worth_NK[0])
    for sharpness in (10.0, 100.0, 1000.0):
        for _ in range(_PRICE_STEPS):
            wish_NK = torch.log_softmax((worth_NK - price_K) * sharpness, dim=1)
            price_K = price_K + (wish_NK.logsumexp(0) - room_K.log()) / sharpness
    wish_NK = worth_NK - price_K
    best_N2 = wish_NK.topk(min(2, len(room_K)), dim=1).values
    surest_first = (best_N2[:, 0] - best_N2[:, -1]).sort(descending=True, stable=True).indices
    left_K, wishes = room_K.tolist(), wish_NK.argsort(dim=1, descending=True).tolist()
    chosen = torch.empty_like(kind_N)
    for who in surest_first.tolist():
        kind = next(k for k in wishes[who] if left_K[k])
        left_K[kind] -= 1
        chosen[who] = kind
    order_N = torch.empty_like(kind_N)
    order_N[kind_N.argsort(stable=True)] = chosen.argsort(stable=True)
    return order_N
