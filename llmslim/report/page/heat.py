"""A map of what was done where: a row for each decoder layer, a column for each projection.

The number of a layer is the first number in a name. Further numbers, those of experts, are written
as `*`: a cell stands for all of them. What belongs to no numbered layer is not on the map.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from llmslim.report import wording
from llmslim.report.bars import layer_params
from llmslim.report.lines import Line, is_number
from llmslim.report.report import Report, Row


@dataclass(frozen=True)
class Cell:
    """The rows of one projection in one layer."""

    line: Line
    worst: float
    """The largest error on the map, which has the full colour."""

    @property
    def removed(self) -> float:
        """Share of the parameters that is gone, from 0 to 1; 0 where there are more than before."""
        before = self.line.params_before
        return max(0.0, 1 - self.line.params_after / before) if before else 0.0

    @property
    def error(self) -> float | None:
        """Mean error of the blocks, if any was fitted."""
        errors = self.line.init_errors
        return sum(errors) / len(errors) if errors else None

    @property
    def heat(self) -> float:
        """The error as a share of the worst."""
        return (self.error or 0.0) / self.worst if self.worst else 0.0

    @property
    def state(self) -> str:
        """`dropped`, `changed` or `same`."""
        actions = {row.action for row in self.line.rows}
        if actions == {"dropped"}:
            return "dropped"
        return "changed" if "replaced" in actions else "same"

    @property
    def words(self) -> str:
        """All about it in a line."""
        one, line = self.line.first, self.line
        error = wording.mean_error(line)
        parts = (
            wording.action(one),
            wording.structure(one),
            f"{wording.percent(line.params_after, line.params_before)} kept",
            f"error {error}" if error else "",
        )
        return f"{line.name}: {', '.join(filter(None, parts))}"


@dataclass(frozen=True)
class LayerRow:
    """One decoder layer."""

    index: int
    cells: tuple[Cell | None, ...]
    """One for each column; None where the layer has no such projection."""
    before: int
    """Parameters of the whole layer."""
    after: int


@dataclass(frozen=True)
class HeatMap:
    """The layers of one stack."""

    stack: str
    """What their names begin with."""
    groups: tuple[tuple[str, int], ...]
    """Modules that columns belong to, and how many columns of each stand side by side."""
    columns: tuple[str, ...]
    """Names of the projections inside these modules."""
    layers: tuple[LayerRow, ...]
    worst: float
    """The largest error of a cell; 0 where nothing was fitted."""


def heat_maps(report: Report) -> list[HeatMap]:
    """Return a map for each stack of layers that has a projection."""
    stacks: dict[str, dict[int, dict[str, list[Row]]]] = defaultdict(lambda: defaultdict(dict))
    for row in report.rows:
        parts = row.name.split(".")
        place = next((n for n, part in enumerate(parts) if is_number(part)), None)
        if place is None or row.kind != "projection":
            continue
        column = ".".join("*" if is_number(part) else part for part in parts[place + 1 :])
        layers = stacks[".".join(parts[:place])]
        layers[int(parts[place])].setdefault(column, []).append(row)
    params = layer_params(report)
    return [_map(stack, layers, params) for stack, layers in stacks.items()]


def _map(
    stack: str,
    layers: dict[int, dict[str, list[Row]]],
    params: dict[tuple[str, int], tuple[int, int]],
) -> HeatMap:
    columns = dict.fromkeys(column for _, found in sorted(layers.items()) for column in found)
    # Those of one module side by side, modules in the order of their first one.
    homes = dict.fromkeys(column.rpartition(".")[0] for column in columns)
    ordered = [c for home in homes for c in columns if c.rpartition(".")[0] == home]
    lines = {
        (index, column): Line(f"{stack}.{index}.{column}", tuple(rows))
        for index, found in layers.items()
        for column, rows in found.items()
    }
    worst = max((Cell(one, 1.0).error or 0.0 for one in lines.values()), default=0.0)
    cells = {place: Cell(one, worst) for place, one in lines.items()}
    rows = tuple(
        LayerRow(index, tuple(cells.get((index, c)) for c in ordered), *params[stack, index])
        for index in sorted(layers)
    )
    leaves = tuple(column.rpartition(".")[2] or stack for column in ordered)
    counts = tuple((home, sum(c.rpartition(".")[0] == home for c in ordered)) for home in homes)
    return HeatMap(stack, counts, leaves, rows, worst)
