"""Turn documents into token ids, and say on which of them the loss falls.

A conversation is written out by the tokenizer's own chat template, or in the source report's form,

    <|user|>{question}<|end|><|assistant|>{answer}<|end|><|endoftext|>

and tokenised in one go, as the model will see it. Where an answer stands in the text is found
without knowing the template: it is what writing out the turns up to and with it adds to the turns
before it plus the generation prompt. That needs the shorter text to be the beginning of the longer
one. Templates that rewrite earlier turns (some drop old reasoning) break this; then the loss falls
on the whole conversation, which is counted.

A plain text begins as the tokenizer begins a text and ends with its end token.

Encoded: ids, with every token on which no loss falls stored as its complement ~id, a negative
number. One array then holds both, in memory and on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from .columns import Document, Message
from .sampling import leading_token

Ids = NDArray[np.int32]
Spans = tuple[tuple[int, int], ...]

REPORT_TAGS = ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")

_WHOLE, _REFUSED, _SILENT = "whole", "refused", "silent"


@dataclass(frozen=True)
class _Written:
    """A document as text."""

    text: str
    answers: Spans | None = None
    """Characters that the assistant says, with the end of its turn; None if that cannot be told."""
    begun: bool = False
    """Whether the text has the token that the tokenizer puts before a text, as templates do."""
    ended: bool = False
    """Whether the text has the token that ends a text, or is to have none."""


@dataclass
class Encoder:
    """Documents in, ids out.

    Args:
        tokenizer: the model's.
        template: the tokenizer's chat template, or the source report's form.
        loss_on: every token, or only what the assistant says and the end of its turn.
    """

    tokenizer: Any
    template: Literal["chat", "report"] = "chat"
    loss_on: Literal["all", "answers"] = "all"
    counts: Counter[str] = field(default_factory=Counter)
    """How many documents turned out otherwise than asked for, by what happened."""

    def __call__(self, documents: Sequence[Document | None]) -> list[Ids]:
        """Return the ids of each document, none for one that is empty or has nothing to learn."""
        written = [self._write(document) if document else _Written("") for document in documents]
        masked = self.loss_on == "answers" and bool(getattr(self.tokenizer, "is_fast", False))
        encoded = self.tokenizer(
            [one.text for one in written],
            add_special_tokens=False,
            truncation=False,
            return_offsets_mapping=masked,
            verbose=False,
        )
        offsets = encoded["offset_mapping"] if masked else [None] * len(written)
        return [
            self._finish(np.array(ids, dtype=np.int32), one, at)
            for ids, one, at in zip(encoded["input_ids"], written, offsets, strict=True)
        ]

    @property
    def key(self) -> str:
        """What the ids depend on beside the documents and the tokenizer's vocabulary."""
        template = self.tokenizer.chat_template if self.template == "chat" else self.template
        return f"{self.loss_on} {template}"

    def notes(self, source: str) -> list[str]:
        """Return sentences about the documents that turned out otherwise than asked for."""
        return [
            f"{source}: {self.counts[what]} {sentence}"
            for what, sentence in _SENTENCES.items()
            if self.counts[what]
        ]

    def _write(self, document: Document) -> _Written:
        """Write a document out, and find the answers in it."""
        if isinstance(document, str):
            report = self.template == "report"
            return _Written(document + "<|endoftext|>" * report, ended=report)
        if self.template == "report":
            return _in_the_reports_form(document)
        if not getattr(self.tokenizer, "chat_template", None):
            return _plain(document)
        try:
            text = self._apply(document)
            answers = self._answers(document, text) if self.loss_on == "answers" else None
        except TemplateError:
            self.counts[_REFUSED] += 1
            return _plain(document)
        said = document[-1]["content"]
        if document[-1].get("unfinished") and said in text:
            text = text[: text.rindex(said) + len(said)]
        return _Written(text, answers, begun=True, ended=True)

    def _answers(self, document: list[Message], text: str) -> Spans | None:
        """Return where the assistant's turns stand in the text, None if that cannot be told."""
        spans = []
        for index, turn in enumerate(document):
            if turn["role"] != "assistant":
                continue
            before = self._apply(document[:index], add_generation_prompt=True) if index else ""
            last = index == len(document) - 1
            behind = text if last else self._apply(document[: index + 1])
            if not text.startswith(before) or not text.startswith(behind):
                return None
            spans.append((len(before), len(behind)))
        return tuple(spans)

    def _apply(self, messages: list[Message], **options: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))

    @cached_property
    def _first(self) -> int | None:
        return leading_token(self.tokenizer)

    def _finish(
        self, ids: Ids, written: _Written, offsets: Sequence[tuple[int, int]] | None
    ) -> Ids:
        """Add the tokens that begin and end a text; mark those on which no loss falls."""
        if not len(ids):
            return ids
        learned = np.ones(len(ids), dtype=bool)
        if self.loss_on == "answers":
            if offsets is None or written.answers is None:
                self.counts[_WHOLE] += 1
            else:
                learned = _within(np.array(offsets), written.answers)
        last = self.tokenizer.eos_token_id
        if not written.begun and self._first is not None and ids[0] != self._first:
            ids, learned = np.insert(ids, 0, self._first), np.insert(learned, 0, False)
        if not written.ended and last is not None and ids[-1] != last:
            ids, learned = np.append(ids, np.int32(last)), np.append(learned, learned[-1])
        if not learned[1:].any():
            self.counts[_SILENT] += 1
            return ids[:0]
        return np.where(learned, ids, ~ids)


def _within(offsets_T2: NDArray[np.int64], spans: Spans) -> NDArray[np.bool_]:
    """Tell which tokens reach into one of the spans; one that only begins before it does."""
    starts, ends = offsets_T2.T
    within = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        within |= (ends > start) & (starts < end)
    return within


def _in_the_reports_form(document: list[Message]) -> _Written:
    """Write a conversation as the source report does; roles of any name get a tag of their own."""
    text, spans = "", []
    unfinished = bool(document[-1].get("unfinished"))
    for turn in document:
        text += f"<|{turn['role']}|>"
        start = len(text)
        text += turn["content"]
        if not turn.get("unfinished"):
            text += "<|end|>"
        if turn["role"] == "assistant":
            spans.append((start, len(text)))
    if not unfinished:
        text += "<|endoftext|>"
        spans = [*spans[:-1], (spans[-1][0], len(text))] if spans else spans
    return _Written(text, tuple(spans), ended=True)


def _plain(document: list[Message]) -> _Written:
    """Write a conversation as paragraphs, for tokenizers without a chat template."""
    text, spans = "", []
    for turn in document:
        text += "\n\n" if text else ""
        if turn["role"] == "assistant":
            spans.append((len(text), len(text) + len(turn["content"])))
        text += turn["content"]
    return _Written(text, tuple(spans), ended=bool(document[-1].get("unfinished")))


_SENTENCES = {
    _REFUSED: (
        "conversations are refused by the chat template, such as ones that do not alternate "
        "between user and assistant; they were read as plain text."
    ),
    _WHOLE: (
        "documents have no answers that can be told apart in the text; the loss falls on all of "
        "each."
    ),
    _SILENT: "documents hold nothing to learn from, such as no answer, and were left out.",
}
