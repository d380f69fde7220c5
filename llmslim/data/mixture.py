"""Split sources into what is trained on and what is held out, and mix them into one pass.

Split: a permutation of a source's documents drawn from the seed, as `datasets` draws it; the first
ones are held out. With LaMini this is the split of the source report. Of the others, those that say
the same as one that is held out, but for spaces, are not trained on.
Weights: how often a pass sees each document of a source; 2.5 is twice, and a random half of them
once more. Where a number of tokens is given, sources without an end (what the model samples, and
streams) give their weight's share of it, and the others the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from llmslim.errors import DataError
from llmslim.recipe.schema import Heal

from .packing import Ints
from .sources import Source
from .tokens import Tokens

HELD_OUT_SHARE = 20
"""One document in so many is held out where nothing else is said."""
_MOST_HELD_OUT = 1000


@dataclass
class Part:
    """One source on its way."""

    source: Source
    weight: float
    sizes: Ints
    """Of each document: tokens, or a lower bound of them from its characters."""
    tokens: Tokens | None
    """None where only the documents chosen are to be tokenised."""
    held_out: Ints
    train: Ints
    identities: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Of each document: the same number for those that say the same, 0 for an empty one."""


@dataclass(frozen=True)
class Pass:
    """Documents in the order in which they are seen."""

    source: Ints
    """Which source each is from."""
    document: Ints
    """Its number there."""
    tokens: int | None
    """How many are wanted of it; all if None."""

    def cut(self, parts: list[Part]) -> Pass:
        """Return as many of the documents as it takes to have the tokens, by the sizes known."""
        if self.tokens is None:
            return self
        sizes = np.empty(len(self.document), dtype=np.int64)
        for index, part in enumerate(parts):
            here = self.source == index
            sizes[here] = part.sizes[self.document[here]]
        count = int(np.searchsorted(sizes.cumsum(), self.tokens)) + 1
        return Pass(self.source[:count], self.document[:count], self.tokens)


def split(parts: list[Part], spec: Heal) -> None:
    """Draw which documents of each source are held out; fills in `held_out` and `train`.

    Args:
        parts: the sources.
        spec: how many to hold out, and the seed.

    Raises:
        DataError: if more are asked for than there are.
    """
    rows = sum(len(part.sizes) for part in parts)
    for part in parts:
        count = len(part.sizes)
        if spec.held_out is not None:
            aside = round(spec.held_out * count / rows)
        elif part.source.held_out is not None:
            aside = part.source.held_out
        else:
            aside = min(_MOST_HELD_OUT, max(1, count // HELD_OUT_SHARE), count - 1)
        if aside >= count:
            raise DataError(
                f"heal.held_out: {spec.held_out or aside}; {part.source.name} has {count} rows, "
                "of which some must be left to train on. Write a smaller number."
            )
        order = np.random.default_rng(spec.seed).permutation(count)
        part.held_out, part.train = order[:aside], order[aside:]


def without_copies(parts: list[Part]) -> list[str]:
    """Take from what is trained on what is also held out, in any of the sources.

    Args:
        parts: the sources, split; `train` is changed.

    Returns:
        Sentences about it.
    """
    held = np.concatenate([part.identities[part.held_out] for part in parts])
    held = held[held != 0]
    copied = [np.isin(part.identities[part.train], held) for part in parts]
    if all(
        bool((part.sizes[part.train][~c] == 0).all()) for part, c in zip(parts, copied, strict=True)
    ):
        if not any(c.any() for c in copied):
            return []
        names = ", ".join(part.source.name for part in parts)
        return [
            f"{names}: every row says the same as one that is held out; they are trained on all "
            "the same, so the held-out loss tells nothing of other text."
        ]
    notes = []
    for part, copies in zip(parts, copied, strict=True):
        part.train = part.train[~copies]
        if copies.any():
            notes.append(
                f"{part.source.name}: {int(copies.sum())} rows say the same as rows that are held "
                "out, and are not trained on."
            )
    return notes


def passes(parts: list[Part], spec: Heal) -> list[Pass]:
    """Return the documents to train on, each pass in random order.

    Args:
        parts: the sources, split.
        spec: how many tokens, and the seed.

    Returns:
        One pass over all sources that have an end; and, where `tokens` are given, one over each
        that has none.
    """
    draw = np.random.default_rng([spec.seed, 0])
    weights = sum(part.weight for part in parts)
    found, together = [], []
    left = spec.tokens
    for index, part in enumerate(parts):
        if spec.tokens is not None and left is not None and part.source.endless:
            share = round(spec.tokens * part.weight / weights)
            left -= share
            order = draw.permutation(part.train)
            found.append(Pass(np.full(len(order), index), order, share))
        else:
            copies, rest = divmod(part.weight, 1)
            more = draw.permutation(part.train)[: round(rest * len(part.train))]
            seen = np.concatenate([*[part.train] * int(copies), more])
            together.append((np.full(len(seen), index), seen))
    if together:
        source, document = (np.concatenate(arrays) for arrays in zip(*together, strict=True))
        order = draw.permutation(len(document))
        found.append(Pass(source[order], document[order], left))
    return found


def join(found: list[Pass], seed: int) -> Pass:
    """Return all passes as one, in random order."""
    source = np.concatenate([one.source for one in found])
    document = np.concatenate([one.document for one in found])
    order = np.random.default_rng([seed, 2]).permutation(len(document))
    return Pass(source[order], document[order], None)
