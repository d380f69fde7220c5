"""In which order rows are trained on: the same for any number of processes.

Left to itself, accelerate gives processes that would run out of rows some of the first ones again,
and a step at the end of a pass would then differ from the one that a single process takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from llmslim.checkpoint import add_tensor


class Filled(Dataset[dict[str, Tensor]]):
    """Rows, each with its number of `tokens`, and behind them as many that teach nothing as needed.

    All processes take as many rows as each other, and all steps as many passes.

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
            return {**row, "tokens": torch.tensor(tokens_in(self.rows, index))}
        silent = {key: value for key, value in self.rows[0].items() if key != "row"}
        nothing = torch.full_like(silent["labels"], -100)
        return {**silent, "labels": nothing, "tokens": torch.tensor(0)}


class Order(Sampler[int]):
    """All rows once, in an order that seed and pass decide alone, then those that teach nothing.

    Args:
        rows: what is to be put in order.
        seed: of the order.
        seen: how many rows all passes take together; the last pass ends there.
    """

    def __init__(self, rows: Filled, seed: int, seen: int | None = None) -> None:
        self.rows, self.seed, self.seen, self.epoch = rows, seed, seen, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which pass over the rows comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed + self.epoch) % (1 << 63))
        order = torch.randperm(self.rows.count, generator=generator).tolist()
        if self.seen is not None:
            order = order[: max(0, self.seen - self.epoch * self.rows.count)]
        yield from order
        yield from range(self.rows.count, self.rows.count + self.rows.length - len(order))


def tokens_in(rows: Any, index: int) -> int:
    """Return how many tokens a packed row holds, padding not counted.

    Rows that do not say so themselves are padded with what looks like a sample without labels.
    """
    if hasattr(rows, "tokens_in"):
        return int(rows.tokens_in(index))
    row = rows[index]
    begins = (row["position_ids"] == 0).nonzero().flatten()
    learned = (row["labels"] != -100).nonzero().flatten()
    last = int(learned[-1]) if len(learned) else 0
    behind = begins[begins > last]
    return int(behind[0]) if len(behind) else len(row["labels"])


def text_digest(text: Any) -> str:
    """Return the SHA-256 of all rows that a healing trains on and measures by."""
    digest = hashlib.sha256()
    for rows in (text.train, text.held_out):
        digest.update(f"{len(rows)} rows\n".encode())
        for index in range(len(rows)):
            for name, tensor in sorted(rows[index].items()):
                add_tensor(digest, name, tensor)
    return digest.hexdigest()
