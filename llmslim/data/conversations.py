"""Conversations sampled from a dense model itself: data to heal with, without a download.

A model trained on a chat template has learned to write both sides of it. Given the template up to
where the user speaks, it makes up a question; given what the template puts between question and
answer, it answers (Magpie, Xu et al. 2024, https://arxiv.org/abs/2406.08464). All is drawn at
temperature 1: cross-entropy on such text is the divergence from the dense model to the slim one,
up to a constant, which is what healing should bring down. Magpie draws the likeliest answer; that
would teach the mode of the distribution only.

The template is not parsed: two marks are put through it as question and answer, and what stands
before, between and behind them is taken. A model without a template writes plain texts, each
begun with a random token as in sampling.py.

Conversations are sampled in batches, whose rows leave as they end. Each batch is a file of JSON
lines in the cache: an interrupted run goes on after the last one, a longer one begins with those
that are there.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from llmslim.errors import DataError
from llmslim.progress import Progress

from .messages import Message, mended
from .sampling import (
    cache_folder,
    draw,
    fingerprint,
    for_sampling,
    longest_input,
    opening_prompts,
)
from .vocabulary import check_ids, embedding_rows, stop_tokens

_LONGEST = 256  # tokens of one conversation; the cost of a token grows with those before it
_LONGEST_QUESTION = 96
_ROWS = 128
_CACHE_BYTES = 2**31
_FEWER = 0.75  # rows that have ended leave the batch when this share is still going
_VERSION = 1  # raised by whoever changes what is sampled: it is part of the cache's key

_MARKS = "\ue000\ue001\ue000", "\ue001\ue000\ue001"  # private use: no template has them


@dataclass(frozen=True)
class _Frame:
    """What a chat template puts around a question and an answer, as ids."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    stops: frozenset[int]
    """Tokens that end a turn."""


@dataclass
class _Talk:
    """One row while it is sampled."""

    question: list[int] | None = None
    """What the user says; None in a plain text."""
    answer: list[int] = field(default_factory=list)
    taken: int = 1
    ended: bool = False
    greedy: range = range(0)
    """At which tokens the likeliest one is taken."""

    def converse(self, frame: _Frame) -> Generator[int, int, None]:
        """Yield the next token; be sent what the model would say after it."""
        for token in frame.before:
            drawn = yield token
        question = self.question = []
        while drawn not in frame.stops and len(question) < _LONGEST_QUESTION:
            question.append(drawn)
            drawn = yield drawn
        for token in frame.between:
            drawn = yield token
        yield from self._say(drawn, frame.stops)

    def write(
        self, opening: list[int], greedy: int, stops: frozenset[int]
    ) -> Generator[int, int, None]:
        """Yield the next token of a plain text that begins with some tokens."""
        self.greedy = range(len(opening), len(opening) + greedy)
        for token in opening:
            drawn = yield token
        self.answer += opening[-1:]
        yield from self._say(drawn, stops)

    def _say(self, drawn: int, stops: frozenset[int]) -> Generator[int, int, None]:
        while drawn not in stops:
            self.answer.append(drawn)
            drawn = yield drawn
        self.ended = True

    def row(self, tokenizer: Any) -> dict[str, Any] | None:
        """Return what was said, as it is kept; None if a side said nothing."""
        sides = (("user", self.question), ("assistant", self.answer))
        messages = [
            Message(role=role, content=tokenizer.decode(ids, skip_special_tokens=True))
            for role, ids in sides
            if ids is not None
        ]
        if not all(message["content"].strip() for message in messages):
            return None
        if not self.ended:
            messages[-1]["unfinished"] = True
        return {"messages": messages, "tokens": self.taken}


def sampled_conversations(
    model: Any,
    tokenizer: Any,
    tokens: int,
    seed: int,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> tuple[str, list[list[Message]]]:
    """Sample conversations from a model through its own chat template, or read them from the cache.

    Args:
        model: the dense model, in any float type, on any device; it is left as it is.
        tokenizer: its tokenizer.
        tokens: how many to sample at least, templates counted.
        seed: the same seed gives the same conversations, on the same kind of machine.
        cache: where they are kept; the user's cache folder if not given.
        progress: called with tokens done, tokens in all, and `sampling`.

    Returns:
        A key that stands for these conversations, and the conversations.

    Raises:
        DataError: if the model's logits are not finite, or it says nothing at all.
    """
    longest = _longest(model)
    rows = min(_ROWS, max(1, _CACHE_BYTES // (longest * _key_value_bytes(model))))
    key = fingerprint(model, tokenizer, _VERSION, longest, _LONGEST_QUESTION, rows, seed)
    found: list[list[Message]] = []
    done = number = 0
    while done < tokens:
        path = (cache or cache_folder()) / f"{key}-{number:05d}.jsonl"
        batch = _read(path)
        if batch is None:

            def report(more: int, so_far: int = done) -> None:
                if progress is not None:
                    progress(min(so_far + more, tokens), tokens, "sampling")

            batch = _sample_batch(model, tokenizer, rows, longest, seed + 10_007 * number, report)
            _write(path, batch)
        if not batch:
            raise DataError(
                "data: self, but the model ends every conversation before it says anything. "
                "Name a file or a data set."
            )
        found += [row["messages"] for row in batch]
        done, number = done + sum(row["tokens"] for row in batch), number + 1
    return f"{key} {number}", found


def _sample_batch(
    model: Any,
    tokenizer: Any,
    rows: int,
    longest: int,
    seed: int,
    report: Callable[[int], None],
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    stops = _end_tokens(model, tokenizer)
    frame = _frame(tokenizer, stops)
    if frame is not None:
        said = (*frame.before, *frame.between)
        check_ids(said, tokenizer, embedding_rows(model), "data: self: the chat template")
    talks = [_Talk() for _ in range(rows)]
    if frame is not None:
        steps = [talk.converse(frame) for talk in talks]
    else:
        openings = opening_prompts(model, tokenizer, rows, generator)
        steps = [talk.write(*opening, stops) for talk, opening in zip(talks, openings, strict=True)]
    with for_sampling(model) as sampler:
        _run(sampler, talks, steps, longest, generator, report)
    return [row for talk in talks if (row := talk.row(tokenizer)) is not None]


@torch.inference_mode()
def _run(
    model: Any,
    talks: list[_Talk],
    steps: list[Generator[int, int, None]],
    longest: int,
    generator: torch.Generator,
    report: Callable[[int], None],
) -> None:
    """Let all rows advance in step until they have ended or are too long."""
    going = list(zip(talks, steps, strict=True))
    feed = [next(step) for step in steps]
    cache = None
    for position in range(1, longest):
        ids_B1 = torch.tensor(feed)[:, None].to(model.device)
        output = model(ids_B1, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        greedy_B = torch.tensor([position in talk.greedy for talk, _ in going])
        drawn = draw(output.logits[:, -1].float(), greedy_B, generator).tolist()
        for index, (talk, step) in enumerate(going):
            if not talk.ended:
                feed[index] = _advance(talk, step, drawn[index])
        report(sum(talk.taken for talk in talks))
        left = [index for index, (talk, _) in enumerate(going) if not talk.ended]
        if not left:
            return
        if len(left) <= _FEWER * len(going):
            cache.batch_select_indices(torch.tensor(left, device=model.device))
            going, feed = [going[index] for index in left], [feed[index] for index in left]


def _advance(talk: _Talk, step: Generator[int, int, None], drawn: int) -> int:
    """Return a row's next token; anything will do for one that has ended."""
    talk.taken += 1
    try:
        return step.send(drawn)
    except StopIteration:
        return drawn


def _frame(tokenizer: Any, stops: frozenset[int]) -> _Frame | None:
    """Return what the chat template puts around the turns, None if there is none to speak of."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [
        {"role": role, "content": mark}
        for role, mark in zip(("user", "assistant"), _MARKS, strict=True)
    ]
    try:
        asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:  # a template for something else than conversation
        return None
    before, _, between = asked.partition(_MARKS[0])
    behind = whole.partition(_MARKS[1])[2]
    ids = [
        tokenizer(mended(text), add_special_tokens=False)["input_ids"] if text else []
        for text in (before, between, behind)
    ]
    if not ids[0] or _MARKS[0] not in asked:
        return None
    return _Frame(tuple(ids[0]), tuple(ids[1]), stops.union(ids[1][:1], ids[2][:1]))


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens after which nothing more is said."""
    return stop_tokens(model).union(tokenizer.all_special_ids)


def _longest(model: Any) -> int:
    return min(_LONGEST, longest_input(model) or _LONGEST)


def _key_value_bytes(model: Any) -> int:
    """Return what the key-value cache takes for one token of one row, in float32."""
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
    except Exception:  # not there, cut short, something else: it is sampled again
        return None
    return rows if ok and rows else None


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Keep rows in a file, whole or not at all; a cache that cannot be written is no error."""
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lines = (json.dumps(row, ensure_ascii=True) for row in rows)
            partial.write_text("\n".join(lines) + "\n", "utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
