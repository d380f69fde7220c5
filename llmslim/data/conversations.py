"""Conversations sampled from a dense model itself: text to fit to and to heal with, no download.

A model trained on a chat template has learned to write both sides of it. Given the template up to
where the user's turn begins, it makes up a question; given what the template puts between question
and answer, it answers (Magpie, Xu et al. 2024, https://arxiv.org/abs/2406.08464). All is drawn at
temperature 1: cross-entropy on such text is the divergence from the dense model to the slim one,
up to a constant, which is what healing should bring down. Magpie draws the likeliest answer; that
would teach the mode of the distribution only.

The template is not parsed: two marks are put through it as question and answer, and the text
before, between and after them is taken. A model without a template writes plain texts, each
begun with a random token as in sampling.py.

Conversations are sampled in batches, which rows leave as they end. Each batch is a file of JSON
lines in the cache: an interrupted run continues after the last one, a longer one begins with those
that are there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from llmslim.progress import Progress

from .messages import Message, replace_surrogates
from .sampling import (
    CACHE_BYTES,
    SampledRow,
    Steps,
    cache_folder,
    fingerprint,
    for_sampling,
    keep,
    opening_prompts,
    sample_rows,
    write_from,
)
from .vocabulary import check_ids, embedding_rows, longest_input, stop_tokens

_LONGEST = 256  # tokens of one conversation; the cost of a token grows with those before it
_LONGEST_QUESTION = 96
ROWS = 64
"""How many are sampled together on a CPU, at most; more would be wasted in the last batch."""
_ROWS_ELSEWHERE = 128
_SHORT, _FEWEST_ROWS = 128, 8  # tokens of a conversation; conversations sampled together
_VERSION = 1  # raise it with every change of what is sampled: it is part of the cache's key

_MARKS = "\ue000\ue001\ue000", "\ue001\ue000\ue001"  # private use: no template has them


@dataclass(frozen=True)
class _Frame:
    """The ids that a chat template puts around a question and an answer."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    stops: frozenset[int]
    """Tokens that end a turn."""

    @property
    def ids(self) -> tuple[int, ...]:
        """All that the template writes itself."""
        return (*self.before, *self.between, *self.after)


def _converse(frame: _Frame, question: list[int], answer: list[int]) -> Steps:
    """Yield the tokens of a conversation; question and answer are filled in."""
    for token in frame.before:
        drawn = yield token
    while drawn not in frame.stops and len(question) < _LONGEST_QUESTION:
        question.append(drawn)
        drawn = yield drawn
    for token in frame.between:
        drawn = yield token
    while drawn not in frame.stops:
        answer.append(drawn)
        drawn = yield drawn


def sampled_conversations(
    model: Any,
    tokenizer: Any,
    tokens: int,
    seed: int,
    *,
    cache: Path | None = None,
    at_once: int | None = None,
    progress: Progress | None = None,
) -> tuple[str, list[list[Message]]]:
    """Sample conversations from a model through its own chat template, or read them from the cache.

    Args:
        model: the dense model, in any float type, on any device; it is left as it is.
        tokenizer: its tokenizer.
        tokens: how many to sample, templates counted, up to the end of a batch.
        seed: the same seed gives the same conversations, on the same kind of machine.
        cache: folder to keep them in; in the user's cache if not given.
        at_once: how many are sampled together, at most, and kept together; by default as many as
            `rows_for` ever gives.
        progress: called with tokens done, tokens in all, and what is done now.

    Returns:
        A key of these conversations, and the conversations: fewer where the model ends all of a
        batch at once, none where that is the first batch.

    Raises:
        DataError: if the model's logits are not finite, or it has no embedding for a token of the
            template.
    """
    stops = _stops(model, tokenizer)
    frame = _frame(tokenizer, stops)
    framed: list[Any] = [sorted(stops)]
    if frame is not None:
        check_ids(frame.ids, tokenizer, embedding_rows(model), "data: self: the chat template")
        framed = [sorted(frame.stops), frame.before, frame.between]
    longest = min(_LONGEST, longest_input(model) or _LONGEST)
    rows = min(
        at_once or rows_for(1e9, model.device),
        max(1, CACHE_BYTES // (longest * _key_value_bytes(model))),
    )
    sizes = longest, _LONGEST_QUESTION, rows
    key = fingerprint(model, tokenizer, _VERSION, sizes, seed, framed)
    found: list[list[Message]] = []
    done = number = 0
    while done < tokens:
        path = (cache or cache_folder()) / f"{key}-{number:05d}.jsonl"
        batch = _read(path)
        if batch is None:

            def report(more: int, so_far: int = done) -> None:
                if progress is not None:
                    enough = so_far + more >= tokens
                    what = "sampling, until the last answers end" if enough else "sampling"
                    progress(min(so_far + more, tokens), tokens, what)

            draws = seed + 10_007 * number
            batch = _sample_batch(model, tokenizer, frame, rows, longest, draws, report)
            keep(path, "".join(f"{json.dumps(row)}\n" for row in batch).encode() or b"\n")
        if not batch:
            break
        found += [row["messages"] for row in batch]
        done, number = done + sum(row["tokens"] for row in batch), number + 1
    return f"{key} {number}", found


def rows_for(tokens: float, device: torch.device) -> int:
    """Return how many conversations to sample together where so many tokens are wanted.

    No more than are needed: a conversation is rarely shorter than 128 tokens.

    Example:
        >>> [rows_for(tokens, torch.device("cpu")) for tokens in (1, 4096, 1e6)]
        [8, 32, 64]
        >>> rows_for(1e6, torch.device("cuda"))
        128
    """
    most = ROWS if device.type == "cpu" else _ROWS_ELSEWHERE
    return min(most, max(_FEWEST_ROWS, math.ceil(tokens / _SHORT)))


def can_converse(model: Any, tokenizer: Any) -> bool:
    """Return whether a chat template frames a question and an answer in tokens of the model.

    Args:
        model: the dense model.
        tokenizer: its tokenizer, or None.
    """
    frame, known = _frame(tokenizer, frozenset()), embedding_rows(model)
    return frame is not None and (known is None or max(frame.ids) < known)


def _sample_batch(
    model: Any,
    tokenizer: Any,
    frame: _Frame | None,
    rows: int,
    longest: int,
    seed: int,
    report: Callable[[int], None],
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    if frame is not None:
        sides: list[tuple[list[int], list[int]]] = [([], []) for _ in range(rows)]
        samples = [SampledRow(_converse(frame, question, answer)) for question, answer in sides]
    else:
        prompts = opening_prompts(model, tokenizer, rows, generator)
        stops = _stops(model, tokenizer)
        samples = [SampledRow(write_from(opening, stops), greedy) for opening, greedy in prompts]
    with for_sampling(model) as sampler:
        sample_rows(sampler, samples, longest, generator, report)
    if frame is None:
        sides = [([], row.ids[row.greedy.start - 1 :]) for row in samples]
    roles = ("user", "assistant") if frame is not None else ("assistant",)
    made = []
    for row, texts in zip(samples, sides, strict=True):
        messages = [
            Message(role=role, content=tokenizer.decode(ids, skip_special_tokens=True))
            for role, ids in zip(roles, texts[-len(roles) :], strict=True)
        ]
        if not row.ended:
            messages[-1]["unfinished"] = True
        if all(message["content"].strip() for message in messages):
            made.append({"messages": messages, "tokens": row.drawn})
    return made


def _stops(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a turn whatever the template."""
    return stop_tokens(model).union(tokenizer.all_special_ids)


def _frame(tokenizer: Any, stops: frozenset[int]) -> _Frame | None:
    """Return what the chat template puts around the turns, None without a usable template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [
        {"role": role, "content": mark}
        for role, mark in zip(("user", "assistant"), _MARKS, strict=True)
    ]
    try:
        prompt = tokenizer.apply_chat_template(
            turns[:1], tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:  # a template for anything but conversation
        return None
    before, _, between = prompt.partition(_MARKS[0])
    after = whole.partition(_MARKS[1])[2]
    first, middle, last = (
        tokenizer(replace_surrogates(text), add_special_tokens=False)["input_ids"] if text else []
        for text in (before, between, after)
    )
    if not first or _MARKS[0] not in prompt:
        return None
    ends = stops.union(middle[:1], last[:1])
    return _Frame(tuple(first), tuple(middle), tuple(last), ends)


def _key_value_bytes(model: Any) -> int:
    """Return the bytes of the key-value cache for one token of one row, in float32."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or math.ceil(config.hidden_size / heads)
    kept = getattr(config, "num_key_value_heads", None) or heads
    return int(config.num_hidden_layers * 2 * kept * width * 4)


def _read(path: Path) -> list[dict[str, Any]] | None:
    """Return the rows kept in a file, None if it is not there or not what was written."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        ok = all(isinstance(row["tokens"], int) and row["messages"] for row in rows)
    except Exception:  # not there, cut short, anything else: it is sampled again
        return None
    return rows if ok and rows else None
