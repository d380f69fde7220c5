"""The token ids that a fit to text looks at, and copies with random tokens for the first layers.

What the first decoder layers' MLPs add depends on the token more than on the text around it, and a
calibration text holds few of the vocabulary's tokens often enough. A fit to it alone is nearly
perfect there and poor on words that the text does not have, which is most of what such a model
loses on other text. So the first layers are also fitted to copies of windows in which half of the
tokens are drawn from the vocabulary; the other half keeps the attention in them like that in text.

Shapes: N windows of L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RANDOM_TOKENS = 16_384
"""Tokens in the copies with random tokens, at most."""
EARLY_LAYERS = 0.1
"""Share of the decoder layers that are fitted to them."""
_DRAWN = 0.5
"""Share of their tokens that are drawn."""
_BATCH_TOKENS = 4096
"""Tokens of a batch on a GPU, at most."""
_SPECIAL = ("_token_id", "_token_ids", "_token_index")


@dataclass(frozen=True)
class TokenWindows:
    """Token ids for methods that need text."""

    windows: Tensor
    """To fit on, (N, L)."""
    held_out: Tensor
    """To measure errors on, (M, L)."""


def windows_per_batch(parts: Sequence[Tensor], device: torch.device) -> int:
    """Return how many windows make a batch: as many as a GPU runs fast, of one size.

    Args:
        parts: windows that are not to be mixed, (N, L) each.
        device: where they are run; a processor is as fast with one.
    """
    most = 1 if device.type == "cpu" else max(1, _BATCH_TOKENS // parts[0].shape[1])
    fit = (n for n in range(most, 0, -1) if not any(len(part) % n for part in parts))
    return next(fit)


def early_layers(count: int) -> int:
    """Return how many of a model's decoder layers are also fitted to random tokens."""
    return max(1, round(EARLY_LAYERS * count))


def random_token_count(tokens: int) -> int:
    """Return how many tokens the copies of some tokens have, at most."""
    return min(RANDOM_TOKENS, tokens)


def with_random_tokens(windows: Tensor, config: Any, seed: int) -> Tensor:
    """Return copies of windows with half of their tokens drawn at random.

    Args:
        windows: token ids, (N, L).
        config: the model's; tokens that it names (`eos_token_id` …) are not drawn.
        seed: of the draw.

    Returns:
        Token ids of the first windows, as many as `RANDOM_TOKENS` allows, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = windows[: max(1, RANDOM_TOKENS // windows.shape[1])].cpu()
    ordinary = torch.ones(config.get_text_config().vocab_size, dtype=torch.bool)
    ordinary[[token for token in _named_tokens(config.to_dict()) if token < len(ordinary)]] = False
    vocabulary = ordinary.nonzero()[:, 0]
    drawn = vocabulary[torch.randint(len(vocabulary), ids.shape, generator=generator)]
    return torch.where(torch.rand(ids.shape, generator=generator) < _DRAWN, drawn, ids)


def _named_tokens(config: dict[Any, Any]) -> Iterator[int]:
    """Yield the tokens that a config, or one inside it, gives a meaning to."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _named_tokens(value)
        elif str(key).endswith(_SPECIAL):
            values = value if isinstance(value, list) else [value]
            yield from (token for token in values if isinstance(token, int) and token >= 0)
