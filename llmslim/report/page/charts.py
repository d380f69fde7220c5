"""Where the points of a chart lie; the template draws them.

Positions are percent of the plot's width and height, counted from its lower left corner: an SVG
that is stretched to any width shows the lines, and HTML beside it the words, which do not stretch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Point = tuple[float, float]

_TICKS = 5
_MOST_POINTS = 400
"""Of a line: more than a screen shows would only make the file larger."""


@dataclass(frozen=True)
class Axis:
    """A linear scale from `low` to `high`."""

    low: float
    high: float
    name: str

    @classmethod
    def over(cls, values: Iterable[float], name: str, *, margin: float = 0.06) -> Axis:
        """Return the axis that holds all values.

        Args:
            values: finite, one at least.
            name: what they are.
            margin: share of their span that is added at both ends.
        """
        found = list(values)
        low, high = min(found), max(found)
        span = (high - low) or abs(high) or 1.0
        return cls(low - margin * span, high + margin * span, name)

    def at(self, value: float) -> float:
        """Return where a value lies, in percent of the axis."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)

    @property
    def ticks(self) -> list[float]:
        """Round values inside the axis, some `_TICKS` of them.

        Example:
            >>> Axis(0.3, 10.2, "x").ticks
            [2.0, 4.0, 6.0, 8.0, 10.0]
        """
        rough = (self.high - self.low) / _TICKS
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(n * step, 12) for n in range(first, last + 1)]


@dataclass(frozen=True)
class Line:
    """A line through points."""

    name: str
    points: tuple[Point, ...]
    dots: bool = False
    """Whether each point is shown."""

    @property
    def path(self) -> str:
        """The points for an SVG polyline of a box of 100 x 100, whose y counts downwards."""
        return " ".join(f"{x:g},{100 - y:g}" for x, y in self.points)


@dataclass(frozen=True)
class Plot:
    """Lines, single points and horizontal levels over two axes."""

    x: Axis
    y: Axis
    lines: tuple[Line, ...] = ()
    levels: tuple[tuple[str, float], ...] = ()
    """Names and heights of horizontal lines."""
    points: tuple[tuple[str, float, float, bool], ...] = ()
    """Name, x, y, and whether it is the one to compare with."""


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Return at most `_MOST_POINTS` of many points: the mean of as many neighbours each."""
    size = math.ceil(len(points) / _MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (math.fsum(x for x, _ in group) / len(group), math.fsum(y for _, y in group) / len(group))
        for group in groups
    ]


def line(name: str, points: Sequence[Point], x: Axis, y: Axis, *, dots: bool = False) -> Line:
    """Return the line through points, which are given in the units of the axes."""
    return Line(name, tuple((x.at(a), y.at(b)) for a, b in points), dots)
