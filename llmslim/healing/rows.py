"""Rows to train on: their order, their batches, and their digest.

The order is the same for any number of processes. accelerate would repeat some of the first rows
for processes without any left, so that the last step of a pass would differ from a single
process's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from llmslim.compat import attention_of
from llmslim.data import collate, collate_apart, collate_flat
from llmslim.healing.packing_check import takes_position_ids
from llmslim.storage import add_tensor

Collate = Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]


class PaddedRows(Dataset[dict[str, Tensor]]):
    """Rows, each with its index (`row`) and number of tokens, padded with rows without labels.

    With them, all processes take equally many rows, and all steps equally many passes.

    Args:
        rows: a map-style data set, not empty.
        multiple: rows of one pass in all processes; the length becomes a multiple of it.
    """

    def __init__(self, rows: Any, multiple: int = 1) -> None:
        self.rows, self.count = rows, len(rows)
        self.length = -(-self.count // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < self.count:
            own = {"row": torch.tensor(index), "tokens": torch.tensor(tokens_in(self.rows, index))}
            return {**self.rows[index], **own}
        row: dict[str, Tensor] = self.rows[0]
        unlabelled = torch.full_like(row["labels"], -100)
        return {**row, "labels": unlabelled, "tokens": torch.tensor(0)}


class SeededSampler(Sampler[int]):
    """All rows once, in an order from seed and pass alone, then those without labels.

    Args:
        rows: to be ordered.
        seed: of the order.
        seen: number of rows of all passes together, where the last pass ends.
    """

    def __init__(self, rows: PaddedRows, seed: int, seen: int | None = None) -> None:
        self.rows, self.seed, self.seen, self.epoch = rows, seed, seen, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass."""
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


def collator_for(model: Any, *, mixes: bool) -> Collate:
    """Return a function from rows to a batch; `row` and `tokens` become `rows`, `tokens`, (N,).

    Args:
        model: FlashAttention needs one long row; positions are left out where it takes none.
        mixes: whether samples in one row would see each other; each then has its own row.
    """
    flash = attention_of(model.config) == "flash_attention_2"
    together = collate_apart if mixes else collate_flat if flash else collate
    takes_positions = takes_position_ids(model)

    def collated(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        own = ("row", "tokens")
        joined = together([{k: v for k, v in row.items() if k not in own} for row in batch])
        if not takes_positions:
            joined.pop("position_ids", None)
        for name, key in zip(("rows", "tokens"), own, strict=True):
            if numbers := [row[key] for row in batch if key in row]:
                joined[name] = torch.stack(numbers)
        return joined

    return collated


def tokens_in(rows: Any, index: int) -> int:
    """Return the number of tokens in a packed row without padding.

    Rows without a method `tokens_in` are padded with what looks like a sample without labels.
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
    """Return the SHA-256 of all rows that a healing trains on or measures."""
    digest = hashlib.sha256()
    for rows in (text.train, text.held_out):
        digest.update(f"{len(rows)} rows\n".encode())
        for index in range(len(rows)):
            for name, tensor in sorted(rows[index].items()):
                add_tensor(digest, name, tensor)
    return digest.hexdigest()
