"""Gram matrices and their factors, against sums in float64 and on inputs that break plain code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmslim.init import (
    GramAccumulator,
    damping,
    equivalent_target,
    relative_error,
    stable_cholesky,
)


def rows(tokens: int, channels: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator)
    return torch.randn(tokens, channels, generator=generator) @ mix


def test_chunks_add_up_to_the_mean_of_the_outer_products() -> None:
    x, y = rows(60, 6), rows(60, 4, seed=1)
    gram = GramAccumulator(6, 4, target_moments=True)
    gram.update(x[:10].reshape(2, 5, 6), y[:10].reshape(2, 5, 4))
    gram.update(x[10:].bfloat16().float(), y[10:])
    seen = torch.cat((x[:10], x[10:].bfloat16().float())).double()
    assert (gram.tokens, gram.skipped) == (60, 0)
    torch.testing.assert_close(gram.gram_II, seen.T @ seen / 60, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gram.cross_OI, y.double().T @ seen / 60, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gram.target_OO, (y.double().T @ y.double()) / 60, rtol=1e-5, atol=1e-5
    )


def test_nothing_seen_is_zeros() -> None:
    gram = GramAccumulator(3)
    gram.update(torch.empty(0, 3))
    assert gram.tokens == 0
    assert gram.cross_OI is None
    assert gram.target_OO is None
    assert torch.equal(gram.gram_II, torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_left_out_and_counted(bad: float) -> None:
    x, y = rows(20, 5), rows(20, 3, seed=1)
    broken_x, broken_y = x.clone(), y.clone()
    broken_x[4, 2] = bad
    broken_y[7, 0] = bad
    gram, clean = GramAccumulator(5, 3), GramAccumulator(5, 3)
    gram.update(broken_x, broken_y)
    good = [t for t in range(20) if t not in {4, 7}]
    clean.update(x[good], y[good])
    assert (gram.tokens, gram.skipped) == (18, 2)
    torch.testing.assert_close(gram.gram_II, clean.gram_II, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gram.cross_OI, clean.cross_OI, rtol=1e-6, atol=1e-6)


def test_an_enormous_row_does_not_wash_out_the_others() -> None:
    """Small channels beside 1e6 in the same row: float32 would lose what they share."""
    x = rows(200, 6)
    x[0] = torch.tensor([1e6, 1.0, 1.0, 1.0, 1.0, 1.0])
    gram = GramAccumulator(6)
    gram.update(x)
    truth = x.double().T @ x.double() / 200
    torch.testing.assert_close(gram.gram_II[1:, 1:], truth[1:, 1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gram.gram_II[0], truth[0], rtol=1e-12, atol=1e-2)


def test_a_finite_row_whose_square_overflows_float32_counts() -> None:
    gram = GramAccumulator(2)
    gram.update(torch.tensor([[1e30, 1.0], [1.0, 1.0], [1.0, 2.0]]))
    assert (gram.tokens, gram.skipped) == (3, 0)
    assert gram.gram_II[0, 0].item() == pytest.approx(1e60 / 3, rel=1e-6)


def awkward() -> dict[str, Tensor]:
    one = torch.randn(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nan = torch.eye(8, dtype=torch.float64)
    nan[2, 3] = nan[3, 2] = float("nan")
    few = rows(3, 8).double()
    dead = rows(50, 8).double()
    dead[:, 4] = 0
    enormous = rows(50, 8).double()
    enormous[0] *= 1e4
    return {
        "zero": torch.zeros(8, 8),
        "rank one": one.T @ one,
        "not finite": nan,
        "infinite power": torch.diag(torch.tensor([float("inf")] + [1.0] * 7)),
        "negative": -torch.eye(8),
        "huge": torch.eye(8) * 1e30,
        "tiny": torch.eye(8) * 1e-30,
        "fewer tokens than channels": few.T @ few / 3,
        "a channel that never fires": dead.T @ dead / 50,
        "one enormous token": enormous.T @ enormous / 50,
    }


@pytest.mark.parametrize("kind", awkward())
@pytest.mark.parametrize("relative", [0.0, 1e-3])
def test_every_matrix_has_a_factor(kind: str, relative: float) -> None:
    gram_II = awkward()[kind]
    factor_II, lambda_I = stable_cholesky(gram_II, relative)
    assert factor_II.isfinite().all()
    assert (factor_II.diagonal() > 0).all()
    assert (lambda_I > 0).all()
    if gram_II.isfinite().all():
        damped = gram_II.double() + lambda_I.diag()
        scale = float(damped.diagonal().max())
        torch.testing.assert_close(factor_II @ factor_II.T / scale, damped / scale)


def test_a_sound_matrix_is_damped_no_more_than_asked() -> None:
    x = rows(500, 8).double()
    gram_II = x.T @ x / 500
    _, lambda_I = stable_cholesky(gram_II, 1e-3)
    assert torch.equal(lambda_I, damping(gram_II, 1e-3))
    # One channel a million times the others must not set everybody's damping.
    gram_II[0] *= 1e3
    gram_II[:, 0] *= 1e3
    assert damping(gram_II, 1e-3)[1:].max() < 1e-2 * gram_II.diagonal()[1:].max()


def test_the_equivalent_weight_is_ridge_regression_towards_the_weight() -> None:
    x, y, w_OI = rows(40, 6).double(), rows(40, 4, seed=1).double(), rows(4, 6, seed=2).double()
    gram_II, cross_OI = x.T @ x / 40, y.T @ x / 40
    found = equivalent_target(cross_OI, gram_II, w_OI)
    root = damping(gram_II).sqrt().diag()
    inputs = torch.cat((x / 40**0.5, root))
    outputs = torch.cat((y / 40**0.5, root @ w_OI.T))
    torch.testing.assert_close(found, torch.linalg.lstsq(inputs, outputs).solution.T)
    # A fit nearest to it is nearest to y: both errors differ by what no matrix can reach.
    other = rows(4, 6, seed=3).double()
    exact = equivalent_target(cross_OI, gram_II, w_OI, 1e-12)
    unreachable = (y - x @ exact.T).square().sum() / 40
    total = (y - x @ other.T).square().sum() / 40
    difference = exact - other
    assert float(total - unreachable) == pytest.approx(
        float((difference @ gram_II * difference).sum()), rel=1e-6
    )


def test_relative_error_is_that_of_the_outputs() -> None:
    x, w_OI, b_OI = rows(40, 6).double(), rows(4, 6, seed=1), rows(4, 6, seed=2)
    y, z = x @ w_OI.double().T, x @ b_OI.double().T
    truth = float((y - z).square().sum() / y.square().sum())
    assert relative_error(b_OI, w_OI, x.T @ x / 40) == pytest.approx(truth, rel=1e-9)
    assert relative_error(b_OI, w_OI, torch.zeros(6, 6)) == 0.0


def test_channels_that_never_fire_take_no_damping_from_the_others() -> None:
    live = torch.tensor([4.0, 2.0, 9.0])
    alone = damping(live.diag())
    dead = torch.zeros(5)
    assert torch.equal(damping(torch.cat((dead, live)).diag())[5:], alone)
    torch.testing.assert_close(alone, torch.full((3,), 0.1 * 4.0).double(), rtol=1e-6, atol=0)


def test_a_matrix_wider_than_a_block_of_columns_is_whole() -> None:
    x_TI = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = GramAccumulator(1000)
    gram.update(x_TI)
    torch.testing.assert_close(gram.gram_II, x_TI.t() @ x_TI / 3)
