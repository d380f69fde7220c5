"""Which tokens a model knows, where it stops, and how its tokenizer begins a text.

Tokenizers are often larger than the embedding: a token was added and the embedding not resized.
That does no harm as long as no text has the token; where one has, the model would fail with an
index out of range, on a GPU without naming it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmslim.errors import DataError, and_more

_MOST_NAMED = 5
_CHUNK_TOKENS = 2**22


def embedding_rows(model: Any) -> int | None:
    """Return how many tokens a model has an embedding for, None if unknown.

    Args:
        model: on any device, the meta device included.
    """
    known = []
    for found in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(found, "weight", None)
        rows = getattr(found, "num_embeddings", None) or getattr(found, "out_features", None)
        if rows is None and weight is not None:
            rows = weight.shape[0]
        if rows is not None:
            known.append(int(rows))
    return min(known, default=None)


def stop_tokens(model: Any) -> frozenset[int]:
    """Return the tokens at which a model stops to generate, by its generation config."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = given if isinstance(given, list) else [given]
    return frozenset(token for token in listed if token is not None)


def leading_token(tokenizer: Any) -> int | None:
    """Return the token that a tokenizer puts before every text, None if it puts none."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def longest_input(model: Any) -> int | None:
    """Return how many tokens a model reads at most, None if its config sets no limit."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest if longest and longest > 0 else None  # XLNet has -1


def check_ids(ids: Any, tokenizer: Any, rows: int | None, where: str) -> None:
    """Refuse text with tokens that a model has no embedding for.

    Args:
        ids: of the text, (T,); a negative one is the complement of a token that is not learned.
        tokenizer: gives the tokens' texts, or None.
        rows: of the embedding; None allows anything.
        where: the text, for the message.

    Raises:
        DataError: if there are such tokens.
    """
    if rows is None:
        return
    beyond: set[int] = set()
    for start in range(0, len(ids), _CHUNK_TOKENS):
        some = np.asarray(ids[start : start + _CHUNK_TOKENS])
        some = np.where(some < 0, ~some, some)
        beyond.update(np.unique(some[some >= rows]).tolist())
    if beyond:
        named = [
            f"{'?' if tokenizer is None else tokenizer.convert_ids_to_tokens(one)!r} with id {one}"
            for one in sorted(beyond)
        ]
        raise DataError(
            f"{where}: has the token {and_more(named, _MOST_NAMED)}; the model's embedding has "
            f"{rows} rows, for ids below {rows}. Use the model's own tokenizer, or "
            "resize the dense model's embedding (resize_token_embeddings) and train it first."
        )
