"""What a model knows of tokens: whether it has an embedding for each, and at which it stops.

Tokenizers are often larger than the embedding: a token was added and the embedding not resized.
That is no matter as long as no text has the token; where one has, the model would end in an index
out of range, on a GPU without a word on which.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmslim.errors import DataError

_MOST_NAMED = 5
_AT_ONCE = 2**22


def embedding_rows(model: Any) -> int | None:
    """Return how many tokens a model knows, None where that is not known.

    Args:
        model: on any device, the one without data included.
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
    """Return the tokens at which a model stops to speak, as its generation config says."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = given if isinstance(given, list) else [given]
    return frozenset(token for token in listed if token is not None)


def check_ids(ids: Any, tokenizer: Any, rows: int | None, where: str) -> None:
    """Refuse text with tokens that a model has no embedding for.

    Args:
        ids: of the text, one after the other; a negative one stands for its complement.
        tokenizer: says what the tokens are, where there is one.
        rows: of the embedding; anything is allowed if None.
        where: the text, for the message.

    Raises:
        DataError: if there are such tokens.
    """
    if rows is None:
        return
    beyond: set[int] = set()
    for start in range(0, len(ids), _AT_ONCE):
        some = np.asarray(ids[start : start + _AT_ONCE])
        some = np.where(some < 0, ~some, some)
        beyond.update(np.unique(some[some >= rows]).tolist())
    if beyond:
        named = ", ".join(
            f"{'?' if tokenizer is None else tokenizer.convert_ids_to_tokens(one)!r} with id {one}"
            for one in sorted(beyond)[:_MOST_NAMED]
        )
        more = len(beyond) - _MOST_NAMED
        raise DataError(
            f"{where}: has the token {named}{f' and {more} more' if more > 0 else ''}; the model's "
            f"embedding has {rows} rows, for ids below {rows}. Take the model's own tokenizer, or "
            "resize the dense model's embedding (resize_token_embeddings) and train it first."
        )
