"""The integers behind every structure: groups, ranks and how many parameters they cost.

No torch here: planning a 70B model must not need a tensor. The file travels inside checkpoints
with the layers that use it.

Source: the group rule is the source report's (`kphi-3`); the rest is counting.
"""

from __future__ import annotations

from fractions import Fraction
from math import gcd, isqrt
from typing import Annotated

WIDTH_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "inner_dim")
"""What configs call the number of neurons of an MLP, over all architectures."""

KeepRatio = Annotated[
    float | None, "Share of the dense weights to keep, as 0.5 or 1/3; the size just below it."
]
"""The option that every structure of these has."""


class StaysDense(ValueError):  # noqa: N818  (an outcome, not a mistake)
    """A projection that a structure cannot shrink; the message is the reason shown in reports."""


class OptionError(ValueError):
    """An option that is wrong, or missing, for a structure or for a projection's sizes.

    Args:
        key: the option; empty where several are wrong together.
        sentence: what was given and what is allowed, without a full stop.
    """

    def __init__(self, key: str, sentence: str) -> None:
        super().__init__(sentence)
        self.key = key


def common_divisors(in_features: int, out_features: int) -> list[int]:
    """Return every common divisor of the two sizes, ascending.

    Example:
        >>> common_divisors(12, 18)
        [1, 2, 3, 6]
    """
    largest = gcd(in_features, out_features)
    small = [d for d in range(1, isqrt(largest) + 1) if largest % d == 0]
    return sorted({*small, *(largest // d for d in small)})


def groups_for_min_channels(in_features: int, out_features: int, min_channels: int) -> int:
    """Return the largest usable number of groups that leaves each group enough input channels.

    Args:
        in_features: input channels I.
        out_features: output channels O.
        min_channels: fewest input channels per group; G <= I // min_channels.

    Returns:
        The largest common divisor of I and O within that limit.

    Raises:
        StaysDense: if that is 1, so that nothing would be grouped.

    Example:
        >>> groups_for_min_channels(3072, 9216, 256)
        12
        >>> groups_for_min_channels(3072, 16384, 256)
        8
    """
    limit = max(1, in_features // min_channels)
    groups = max(d for d in common_divisors(in_features, out_features) if d <= limit)
    if groups == 1:
        raise StaysDense(
            f"no common divisor of {in_features} and {out_features} from 2 to {limit} "
            f"(at least {min_channels} input channels per group)"
        )
    return groups


def check_groups(in_features: int, out_features: int, groups: int, key: str = "groups") -> int:
    """Return `groups` if it divides both sizes.

    Args:
        in_features: input channels I.
        out_features: output channels O.
        groups: the number.
        key: the option that it is the value of.

    Raises:
        OptionError: if it does not; the message lists what would.
    """
    if groups < 1 or in_features % groups or out_features % groups:
        allowed = ", ".join(map(str, common_divisors(in_features, out_features)))
        raise OptionError(
            key,
            f"{key} {groups} does not divide in_features {in_features} and "
            f"out_features {out_features}; allowed {allowed}",
        )
    return groups


def check_rank(in_features: int, out_features: int, rank: int) -> int:
    """Return `rank` if a matrix of these sizes can have it.

    Raises:
        OptionError: if it cannot.
    """
    largest = min(in_features, out_features)
    if not 1 <= rank <= largest:
        raise OptionError("rank", f"rank {rank}; allowed 1 to {largest}")
    return rank


def exact_ratio(keep_ratio: float) -> Fraction:
    """Read a ratio as its author meant it: the nearest fraction with at most three digits below.

    Example:
        >>> exact_ratio(0.3333), exact_ratio(0.5)
        (Fraction(1, 3), Fraction(1, 2))
    """
    return Fraction(keep_ratio).limit_denominator(1000)


def budget(in_features: int, out_features: int, keep_ratio: float) -> int:
    """Return how many weights `keep_ratio` of a dense (O, I) projection allows.

    Raises:
        OptionError: if the ratio is not above 0 and at most 1.
    """
    if not 0 < keep_ratio <= 1:
        raise OptionError("keep_ratio", f"keep_ratio {keep_ratio}; allowed above 0 and at most 1")
    return int(in_features * out_features * exact_ratio(keep_ratio))
