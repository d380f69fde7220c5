"""Calibration windows with random tokens in them, for the layers that answer to single tokens.

What the first decoder layers' MLPs add depends on the token more than on the text around it, and a
calibration text holds few of the vocabulary's tokens often enough. A fit to it alone is nearly
perfect there and poor on words that the text has not, which is most of what a model fitted so loses
on other text. So the first layers are also fitted to copies of windows in which every other token
is drawn from the vocabulary; the other half keeps the attention in them like that in text.

Shapes: N windows of L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TOKENS = 16_384
"""Tokens of scrambled copies, at most."""
EARLY = 0.1
"""Share of the decoder layers that see them."""
_DRAWN = 0.5
"""Share of their tokens that are drawn."""
_SPECIAL = ("_token_id", "_token_ids", "_token_index")


def early_layers(count: int) -> int:
    """Return how many of a model's decoder layers are fitted to scrambled windows, too."""
    return max(1, round(EARLY * count))


def scrambled_tokens(tokens: int) -> int:
    """Return how many tokens the scrambled copies of so many have, at the most."""
    return min(TOKENS, tokens)


def scrambled(windows: Tensor, config: Any, seed: int) -> Tensor:
    """Return copies of windows with half of their tokens drawn at random.

    Args:
        windows: token ids, (N, L).
        config: the model's; tokens that it names (`eos_token_id` …) are not drawn.
        seed: of the draw.

    Returns:
        Token ids of the first windows, as many as `TOKENS` allows, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = windows[: max(1, TOKENS // windows.shape[1])].cpu()
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
