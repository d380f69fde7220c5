"""In which order rows are trained on: the same for any number of processes.

Left to itself, accelerate gives processes that would run out of rows some of the first ones again,
and a step at the end of a pass would then differ from the one that a single process takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler


class Filled(Dataset[dict[str, Tensor]]):
    """Rows, and behind them as many that teach nothing as make all processes even.

    Args:
        rows: a map-style data set, not empty.
        together: rows that all processes take in one pass; their number becomes a multiple of it.
    """

    def __init__(self, rows: Any, together: int) -> None:
        self.rows, self.count = rows, len(rows)
        self.length = -(-self.count // together) * together

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < self.count:
            row: dict[str, Tensor] = self.rows[index]
            return row
        silent = {key: value for key, value in self.rows[0].items() if key != "row"}
        return {**silent, "labels": torch.full_like(silent["labels"], -100)}


class Order(Sampler[int]):
    """All rows once, in an order that seed and pass decide alone, then those that teach nothing.

    Args:
        rows: what is to be put in order.
        seed: of the order.
    """

    def __init__(self, rows: Filled, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the rows comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed + self.epoch) % (1 << 63))
        yield from torch.randperm(self.rows.count, generator=generator).tolist()
        yield from range(self.rows.count, self.rows.length)
