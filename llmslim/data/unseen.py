"""Put tokens into calibration windows that the text itself does not have.

The first MLPs of a model answer to single tokens, and calibration text holds a fraction of the
vocabulary. Neurons that only other tokens need look useless then, and a fit drops them. A few
random tokens among the real ones show them all; what it is worth is in docs/benchmarks.md.

Shapes: N windows of L tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def plain_tokens(tokenizer: Any, model: Any = None) -> Tensor:
    """Return the ids that stand for text, (V,): not the special ones.

    Args:
        tokenizer: the model's; without one, every row of the model counts.
        model: the model; without one, the tokenizer is believed.
    """
    rows = None if model is None else model.get_input_embeddings().weight.shape[0]
    if tokenizer is None:
        return torch.arange(rows)
    ids = set(tokenizer.get_vocab().values()).difference(tokenizer.all_special_ids)
    return torch.tensor(sorted(i for i in ids if rows is None or i < rows), dtype=torch.int64)


def with_random_tokens(
    ids_NL: Tensor, share: float, vocabulary: Tensor, seed: int, *, first: bool = False
) -> Tensor:
    """Return windows with some tokens replaced by others, at random places.

    Every token of the vocabulary is drawn once before any is drawn again, so that few windows
    show many of them.

    Args:
        ids_NL: token ids.
        share: of the tokens, how many are replaced, 0 to 1.
        vocabulary: ids to draw from, (V,).
        seed: of places and draws.
        first: whether every window begins with a token that must stay.
    """
    generator = torch.Generator().manual_seed(seed)
    places_NL = torch.rand(ids_NL.shape, generator=generator) < share
    if first:
        places_NL[:, 0] = False
    count, size = int(places_NL.sum()), len(vocabulary)
    if not count or not size:
        return ids_NL
    passes = -(-count // size)
    drawn = torch.cat([torch.randperm(size, generator=generator) for _ in range(passes)])[:count]
    varied_NL = ids_NL.clone()
    varied_NL[places_NL] = vocabulary[drawn]
    return varied_NL
