"""Rows to train on: their order, their batches, and what identifies them.

The order is the same for any number of processes. Left to itself, accelerate gives processes that
would run out of rows some of the first ones again, and a step at the end of a pass would then
differ from the one that a single process takes.
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
from llmslim.storage import add_tensor

Collate = Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]


class PaddedRows(Dataset[dict[str, Tensor]]):
    """Rows, each with its index (`row`) and number of tokens, then rows without labels as needed.

    All processes take as many rows as each other, and all steps as many passes.

    Args:
        rows: a map-style data set, not empty.
        multiple: rows that all processes take in one pass; the length becomes a multiple of it.
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
    """All rows once, in an order that seed and pass decide alone, then those without labels.

    Args:
        rows: what is to be put in order.
        seed: of the order.
        seen: how many rows all passes take together; the last pass ends there.
    """

    def __init__(self, rows: PaddedRows, seed: int, seen: int | None = None) -> None:
        self.rows, self.seed, self.seen, self.epoch = rows, seed, seen, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass whose order comes next."""
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
    """Return what makes a batch of rows; `row` and `tokens` become lists, `rows` and `tokens`.

    Args:
        model: FlashAttention wants one long row.
        mixes: whether samples in one row would see each other; each then has a row of its own.
    """
    flash = attention_of(model.config) == "flash_attention_2"
    together = collate_apart if mixes else collate_flat if flash else collate

    def collated(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        inputs = [{k: row[k] for k in row if k not in ("row", "tokens")} for row in batch]
        lists = {"rows": [row["row"] for row in batch if "row" in row]}
        lists["tokens"] = [row["tokens"] for row in batch if "tokens" in row]
        joined = together(inputs)
        return {**joined, **{name: torch.stack(one) for name, one in lists.items() if one}}

    return collated


def tokens_in(rows: Any, index: int) -> int:
    """Return how many tokens a packed row holds, padding not counted.

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
    """Return the SHA-256 of all rows that a healing trains on and measures by."""
    digest = hashlib.sha256()
    for rows in (text.train, text.held_out):
        digest.update(f"{len(rows)} rows\n".encode())
        for index in range(len(rows)):
            for name, tensor in sorted(rows[index].items()):
                add_tensor(digest, name, tensor)
    return digest.hexdigest()
