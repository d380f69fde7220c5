"""Trained weights in a narrower type: each becomes a neighbour, and their mean stays."""

from __future__ import annotations

import pytest
import torch

from llmslim.healing.rounding import rounded

NARROW = [torch.bfloat16, torch.float16]


def every_number(dtype):
    """Return all finite numbers of a 16-bit type, sorted, in float64; 0 once."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).double()
    return values[values.isfinite()].unique()


@pytest.mark.parametrize("dtype", NARROW)
def test_what_the_type_holds_stays_as_it_is(dtype):
    held = every_number(dtype).float()
    assert torch.equal(rounded(held, dtype, seed=1, name="w").float(), held)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", [1e-7, 1e-5, 1.0, 100.0])
def test_each_becomes_one_of_its_two_neighbours_as_often_as_keeps_the_mean(dtype, size):
    w = torch.randn(50, generator=torch.Generator().manual_seed(3)) * size
    numbers = every_number(dtype)
    above = torch.searchsorted(numbers, w.double()).clamp(1)
    down, up = numbers[above - 1], numbers[above]
    many = torch.stack([rounded(w, dtype, seed=seed, name="w").double() for seed in range(500)])
    assert ((many == down) | (many == up)).all()
    share = (many == up).double().mean(0)
    expected = (w.double() - down) / (up - down)
    # Five standard deviations of 500 draws.
    assert (share - expected).abs().max() < 5 * 0.5 / 500**0.5


def test_float64_in_float32():
    w = torch.tensor([1.0, 1 + 2.0**-26, -(1 + 2.0**-24), 3e-40], dtype=torch.float64)
    many = torch.stack([rounded(w, torch.float32, seed=n, name="w").double() for n in range(2000)])
    assert set(many[:, 0].tolist()) == {1.0}
    assert set(many[:, 1].tolist()) == {1.0, 1 + 2.0**-23}
    assert (many[:, 1] > 1).double().mean() == pytest.approx(1 / 8, abs=0.04)
    assert (many[:, 2] < -1).double().mean() == pytest.approx(1 / 2, abs=0.05)


def test_chance_is_that_of_seed_and_name_alone():
    w = torch.randn(300, 7)
    first = rounded(w, torch.bfloat16, seed=1, name="a")
    assert torch.equal(first, rounded(w, torch.bfloat16, seed=1, name="a"))
    assert not torch.equal(first, rounded(w, torch.bfloat16, seed=2, name="a"))
    assert not torch.equal(first, rounded(w, torch.bfloat16, seed=1, name="b"))
    assert torch.equal(first, rounded(w.t().contiguous().t(), torch.bfloat16, seed=1, name="a"))


def test_a_number_that_the_type_cannot_hold_is_infinite():
    w = torch.tensor([65519.0, 7e4, -7e4, torch.nan])
    many = torch.stack([rounded(w, torch.float16, seed=n, name="w") for n in range(20)])
    assert set(many[:, 0].tolist()) == {65504.0}
    assert (many[:, 1] == torch.inf).all()
    assert (many[:, 2] == -torch.inf).all()
    assert many[:, 3].isnan().all()
    assert rounded(w[3:], torch.bfloat16, seed=0, name="w").isnan().all()
