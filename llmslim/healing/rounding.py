"""Round trained weights to the type that they are stored in, without bias.

Training moves most weights by less than half the distance between two bfloat16 numbers. Rounding to
nearest would undo that. Here a weight becomes one of its two neighbours at random, with

    P(up) = (w - down) / (up - down)      so that the mean of what is stored is w

(stochastic rounding, Gupta et al. 2015, https://arxiv.org/abs/1502.02551). A layer's sums over
thousands of weights keep the update; the noise is that of any rounding to the type. A weight that
the type can represent is unchanged, so what was not trained does not change. Random numbers are
drawn on the CPU from the seed and the weight's name, so the result is repeatable.

Left out: adding each rounding error to the next weight of a row, which keeps a row's sum and was
far worse when measured (docs/benchmarks.md).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_PIECE = 1 << 24  # numbers that are rounded at once


def rounded(weight: Tensor, dtype: torch.dtype, *, seed: int, name: str) -> Tensor:
    """Return a weight in a narrower type, each number rounded up or down at random.

    Args:
        weight: float32 or float64.
        dtype: bfloat16, float16 or float32.
        seed: of the random numbers.
        name: the weight's unique name.

    Returns:
        The weight, of type `dtype`; infinite where it is too large for the type.

    Example:
        >>> weight = torch.tensor([1.0, 1.0 + 2**-9, 1e30])
        >>> rounded(weight, torch.bfloat16, seed=0, name="w")[:1]
        tensor([1.], dtype=torch.bfloat16)
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    chance = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    result = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    given, found = weight.detach().contiguous().view(-1), result.view(-1)
    for start in range(0, len(given), _PIECE):
        here = slice(start, start + _PIECE)
        found[here] = _rounded(given[here], dtype, chance)
    return result


def _rounded(w: Tensor, dtype: torch.dtype, chance: torch.Generator) -> Tensor:
    """Round one piece; `w` is flat."""
    if (w.dtype, dtype) == (torch.float32, torch.bfloat16):
        # bfloat16 is the upper half of float32; the lower half is the probability of a carry. Much
        # faster than the general case below.
        draws = torch.empty(-(-len(w) // 4), dtype=torch.int64)
        draws.random_(-(1 << 63), None, generator=chance)
        lower = draws.view(torch.int16)[: len(w)].to(w.device, torch.int32) & 0xFFFF
        upper = (w.view(torch.int32) + lower) >> 16
        return torch.where(w.isfinite(), upper.to(torch.int16).view(dtype), w.to(dtype))
    about = torch.finfo(dtype)
    nearest = w.to(dtype)
    draw = torch.rand(w.shape, generator=chance, dtype=w.dtype).to(w.device)
    # Between two powers of 2 the type's numbers are a power of 2 apart, so this division is exact.
    unit = torch.ldexp(torch.ones_like(w), torch.frexp(w).exponent - 1) * about.eps
    unit = unit.clamp(min=max(about.tiny * about.eps, torch.finfo(w.dtype).tiny))
    either = ((w / unit + draw).floor() * unit).clamp(about.min, about.max).to(dtype)
    held = (nearest.to(w.dtype) == w) | ~nearest.isfinite()
    return torch.where(held, nearest, either)
