"""How much of a repair a fit takes on, against sums over the tokens themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmslim.fitting.moments import Moments, corrected_weight
from llmslim.init import equivalent_target


def rows(tokens: int, channels: int, seed: int) -> Tensor:
    return torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed))


def moments(fit: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> Moments:
    made = Moments.of(fit[0].shape[1], fit[1].shape[1], device=torch.device("cpu"))
    made.fit.update(*fit)
    made.held_out.update(*held_out)
    return made


def error(weight_OI: Tensor, x_TI: Tensor, y_TO: Tensor) -> float:
    return float((y_TO.double() - x_TI.double() @ weight_OI.double().t()).square().sum())


W, REPAIR = rows(4, 12, 0), 0.3 * rows(4, 12, 1)
X, OTHER = rows(400, 12, 2), rows(100, 12, 3)


def test_a_repair_that_holds_on_other_text_is_made_in_full() -> None:
    full = W + REPAIR
    found = corrected_weight(moments((X, X @ full.t()), (OTHER, OTHER @ full.t())), W)
    assert error(found, OTHER, OTHER @ full.t()) < 0.05 * error(W, OTHER, OTHER @ full.t())


def test_a_repair_that_harms_other_text_is_left_out() -> None:
    seen, unseen = X @ (W + REPAIR).t(), OTHER @ (W - REPAIR).t()
    assert torch.equal(corrected_weight(moments((X, seen), (OTHER, unseen)), W), W.double())


def test_no_other_share_does_better_on_held_out_tokens() -> None:
    # Few tokens and noisy targets: part of the repair is chance.
    x_TI = X[:30]
    y_TO = x_TI @ (W + REPAIR).t() + 2 * rows(30, 4, 5)
    wanted = OTHER @ (W + REPAIR).t()
    given = moments((x_TI, y_TO), (OTHER, wanted))
    best = error(corrected_weight(given, W), OTHER, wanted)
    assert best < error(W, OTHER, wanted)
    cross, gram = given.fit.cross_OI, given.fit.gram_II
    assert cross is not None
    step = equivalent_target(cross, gram, W) - W
    for share in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        assert best <= error(W + share * step, OTHER, wanted) * (1 + 1e-9)


def test_targets_may_be_inputs_of_the_dense_projection() -> None:
    mixed = X + 0.2 * rows(400, 12, 6)
    other = OTHER + 0.2 * rows(100, 12, 7)
    through = corrected_weight(moments((mixed, X), (other, OTHER)), W, W)
    direct = corrected_weight(moments((mixed, X @ W.t()), (other, OTHER @ W.t())), W)
    torch.testing.assert_close(through, direct, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_without_a_held_out_token_the_repair_is_made_in_full(bad: float) -> None:
    given = moments((X, X @ (W + REPAIR).t()), (torch.full((3, 12), bad), torch.zeros(3, 4)))
    cross = given.fit.cross_OI
    assert cross is not None
    assert torch.equal(corrected_weight(given, W), equivalent_target(cross, given.fit.gram_II, W))
