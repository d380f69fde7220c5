"""Fill rows of equal length with whole samples that do not see each other.

Short samples padded to the context would be mostly padding. Here each sample goes into the row in
which it leaves the least room, the longest of a buffer first (best fit decreasing), and rows with
room left stay open for the next buffer, so that only the last few are padded.

Position ids restart at 0 with each sample. transformers separates the samples by them: the
attention mask it makes is block-diagonal, and FlashAttention gets the samples' lengths. It does so
only where there is neither an attention mask nor a key-value cache: a model must be called with
`use_cache=False`. And with FlashAttention only in batches of one row, as `collate_flat` makes them;
it also drops the padding.

Some architectures carry more than attention from token to token, or make their mask without
position ids: there samples in one row would see each other. `collate_apart` gives each sample a row
of the batch instead. Rows for it are filled with samples of nearly equal length (`pack_evenly`), so
that the batch is no larger than a row.

A sample longer than a row is cut into pieces, each a separate sample. The first token of a sample
is not learned, since the token before it in the row is of another one.

Shapes: N rows of L tokens; T tokens without padding; S samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from .tokens import Tokens
from .vocabulary import check_ids

IGNORED = -100  # the label that transformers' losses leave out

_BUFFER = 8192

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Stretches of tokens that are never split."""

    source: Ints
    """Which of the sources each is from."""
    start: Ints
    """Where it begins in that source's ids."""
    length: Ints
    """Its number of tokens."""

    def __getitem__(self, which: NDArray[Any]) -> Pieces:
        return Pieces(self.source[which], self.start[which], self.length[which])


class Rows(Dataset[dict[str, Tensor]]):
    """Packed rows, read from disk when they are needed.

    Args:
        sources: the tokens.
        pieces: the samples, none longer than a row.
        context_length: tokens of one row, L.
        pad: the token that fills up a row.
        seed: of the order of the rows.
        evenly: whether rows are for `collate_apart`.
    """

    def __init__(
        self,
        sources: Sequence[Tokens],
        pieces: Pieces,
        context_length: int,
        pad: int,
        seed: int,
        *,
        evenly: bool = False,
    ) -> None:
        self.context_length = context_length
        self._sources = tuple(sources)
        self._pad = pad
        row_of = (pack_evenly if evenly else pack)(pieces.length, context_length)
        rows = int(row_of.max(initial=-1)) + 1
        shuffled = np.random.default_rng([seed, 1]).permutation(rows)
        row_of = shuffled[row_of]
        self._pieces = pieces[np.argsort(row_of, kind="stable")]
        self._ends = np.cumsum(np.bincount(row_of, minlength=rows))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a row's `input_ids`, `labels` and `position_ids`, each (L,) int64.

        Raises:
            IndexError: if there is no such row.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        input_ids = np.full(self.context_length, self._pad, dtype=np.int64)
        labels = np.full(self.context_length, IGNORED, dtype=np.int64)
        position_ids = np.arange(self.context_length)
        at = 0
        for piece in self._pieces_in(index % len(self)):
            start, length = self._pieces.start[piece], int(self._pieces.length[piece])
            ids = self._sources[self._pieces.source[piece]].ids[start : start + length]
            here = slice(at, at + length)
            input_ids[here] = np.where(ids < 0, ~ids, ids)
            labels[here] = np.where(ids < 0, IGNORED, ids)
            labels[at] = IGNORED
            position_ids[here] -= at
            at += length
        position_ids[at:] -= at
        arrays = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def tokens_in(self, index: int) -> int:
        """Return the tokens of one row, without padding."""
        return int(self._pieces.length[self._pieces_in(index)].sum())

    def _pieces_in(self, index: int) -> range:
        """Return the numbers of the pieces in one row."""
        return range(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))

    @property
    def tokens(self) -> int:
        """Tokens in all rows, without padding."""
        return int(self._pieces.length.sum())

    def check_known(self, tokenizer: Any, vocabulary: int | None) -> None:
        """Refuse rows for a model without an embedding for some of their tokens.

        Args:
            tokenizer: gives the tokens' texts, or None.
            vocabulary: how many tokens the model knows, None if unknown.

        Raises:
            DataError: if there are other tokens.
        """
        for tokens in self._sources:
            check_ids(tokens.ids, tokenizer, vocabulary, "heal.data")
        check_ids([self._pad], tokenizer, vocabulary, "heal.data: padding")

    @property
    def padding(self) -> float:
        """Share of all positions that are padding."""
        return 1 - self.tokens / (len(self) * self.context_length) if len(self) else 0.0


def pack(lengths: Ints, capacity: int) -> Ints:
    """Assign samples to rows, so that each row's lengths add up to at most its capacity.

    Args:
        lengths: of each sample, (S,), in any order, none longer than a row.
        capacity: tokens of one row.

    Returns:
        The number of each sample's row, from 0, (S,).

    Example:
        >>> pack(np.array([3, 7, 2, 5, 1]), 9).tolist()
        [1, 0, 0, 1, 1]
    """
    row_of = np.empty(len(lengths), dtype=np.int64)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room they have
    rooms = 0  # bit r: whether a row with room r is open
    rows = 0
    for longest_first in _longest_first(lengths):
        for sample in longest_first.tolist():
            length = int(lengths[sample])
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                row = open_rows[room].pop()
                if not open_rows[room]:
                    rooms ^= 1 << room
            else:
                room, row, rows = capacity, rows, rows + 1
            row_of[sample] = row
            room -= length
            if room:
                open_rows[room].append(row)
                rooms |= 1 << room
    return row_of


def pack_evenly(lengths: Ints, capacity: int) -> Ints:
    """Assign samples to rows, so that in each row number x longest is at most its capacity.

    Args:
        lengths: of each sample, (S,), in any order, none longer than a row.
        capacity: tokens of one row.

    Returns:
        The number of each sample's row, from 0, (S,).

    Example:
        >>> pack_evenly(np.array([3, 7, 2, 5, 1]), 9).tolist()
        [2, 0, 2, 1, 2]
    """
    row_of = np.empty(len(lengths), dtype=np.int64)
    rows = 0
    for longest_first in _longest_first(lengths):
        at = 0
        while at < len(longest_first):
            together = longest_first[at : at + capacity // int(lengths[longest_first[at]])]
            row_of[together] = rows
            at, rows = at + len(together), rows + 1
    return row_of


def _longest_first(lengths: Ints) -> Iterator[Ints]:
    """Yield the numbers of a buffer of samples at a time, the longest ones first."""
    for start in range(0, len(lengths), _BUFFER):
        yield np.argsort(-lengths[start : start + _BUFFER], kind="stable") + start


def cut(tokens: Sequence[Tokens], documents: Ints, capacity: int) -> Pieces:
    """Return documents as pieces that fit into a row, without pieces that are not learned from.

    Args:
        tokens: the sources.
        documents: their numbers, counted through all sources, (D,).
        capacity: tokens of one row.
    """
    source = np.repeat(np.arange(len(tokens)), [len(one.lengths) for one in tokens])[documents]
    starts = np.concatenate([one.starts for one in tokens])[documents]
    lengths = np.concatenate([one.lengths for one in tokens])[documents]
    parts = -(-lengths // capacity)
    which = np.repeat(np.arange(len(documents)), parts)
    number = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
    start = starts[which] + number * capacity
    length = np.minimum(capacity, lengths[which] - number * capacity)
    keep = np.ones(len(which), dtype=bool)
    for piece in np.flatnonzero(parts[which] > 1):
        ids = tokens[source[which[piece]]].ids[start[piece] + 1 : start[piece] + length[piece]]
        keep[piece] = bool((ids >= 0).any())
    return Pieces(source[which], start, length)[keep]


def collate(batch: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack rows into tensors, (N, L); without an attention mask, which packing forbids."""
    return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}


def collate_flat(batch: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join rows into one of (1, T), without their padding: for FlashAttention."""
    whole = [_without_padding(row) for row in batch]
    return {name: torch.cat([row[name] for row in whole])[None] for name in batch[0]}


def collate_apart(batch: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Give each sample a row of the batch, (S, length of the longest sample).

    Samples come in the order of their rows. Those without a label, as padding, are left out.
    """
    samples: list[dict[str, Tensor]] = []
    for row in map(_without_padding, batch):
        begins = _begins(row)
        for begin, end in zip(begins, [*begins[1:], len(row["labels"])], strict=True):
            samples.append({name: tensor[begin:end] for name, tensor in row.items()})
    learned = [one for one in samples if (one["labels"] != IGNORED).any()] or samples[:1]
    apart = {
        name: pad_sequence([one[name] for one in learned], batch_first=True, padding_value=value)
        for name, value in (("input_ids", 0), ("labels", IGNORED))
    }
    # They continue after a sample's end: where positions restart, another sample would begin.
    positions_L = torch.arange(apart["labels"].shape[1])
    return {**apart, "position_ids": positions_L.expand_as(apart["labels"])}


def _without_padding(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut a row after its last sample that has a label."""
    learned = (row["labels"] != IGNORED).nonzero().flatten()
    last = int(learned[-1]) if len(learned) else 0
    end = next((begin for begin in _begins(row) if begin > last), len(row["labels"]))
    return {name: tensor[:end] for name, tensor in row.items()}


def _begins(row: dict[str, Tensor]) -> list[int]:
    """Return where each sample of a row begins."""
    return (row["position_ids"] == 0).nonzero().flatten().tolist()
