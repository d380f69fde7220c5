"""The integers behind every structure: groups, ranks and how many parameters they cost.

No torch here: planning a 70B model must not need a tensor. The file travels inside checkpoints
with the layers that use it.

Source: the group rule is the source report's (`kphi-3`); the rest is counting.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import gcd, isqrt

WIDTH_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "inner_dim")
"""What configs call the number of neurons of an MLP, over all architectures."""


class StaysDense(ValueError):  # noqa: N818  (an outcome, not a mistake)
    """A projection that a structure cannot shrink; the message is the reason shown in reports."""


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


def check_groups(in_features: int, out_features: int, groups: int) -> int:
    """Return `groups` if it divides both sizes.

    Raises:
        ValueError: if it does not; the message lists what would.
    """
    if groups < 1 or in_features % groups or out_features % groups:
        allowed = ", ".join(map(str, common_divisors(in_features, out_features)))
        raise ValueError(
            f"groups {groups} does not divide in_features {in_features} and "
            f"out_features {out_features}; allowed {allowed}"
        )
    return groups


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
        ValueError: if the ratio is not above 0 and at most 1.
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio {keep_ratio}; allowed above 0 and at most 1")
    return int(in_features * out_features * exact_ratio(keep_ratio))


def first_within(
    candidates: Iterator[tuple[int, int]] | list[tuple[int, int]], allowed: int, what: str
) -> int:
    """Return the first candidate whose cost is within `allowed`.

    Args:
        candidates: pairs of value and cost in parameters, best first.
        allowed: the budget in parameters.
        what: what the values are, for the reason given when none fits.

    Raises:
        StaysDense: if none fits.
    """
    for value, cost in candidates:
        if cost <= allowed:
            return value
    raise StaysDense(f"no {what} keeps it within {allowed:,} parameters")
