"""Turn documents into token ids, and mark those that the loss leaves out.

A conversation is written by the tokenizer's own chat template (chat.py), or in the kphi-3 report's
form,

    <|user|>{question}<|end|><|assistant|>{answer}<|end|><|endoftext|>

and tokenised in one call, as the model will see it. masks.py finds the answers in the text; which
tokens these are follows from the tokens' offsets in the whole text. The offsets of a token that
takes in the space around it, as many tags do, are those without that space.

A plain text begins as the tokenizer begins a text and ends with its end token.

Encoded: ids, with every token that is not learned stored as its complement ~id, a negative
number. One array then holds both, in memory and on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .chat import Chat, calls_as_text
from .columns import counted
from .masks import Masks, Span, inside_by_pieces, within
from .messages import Document, Message, tools_of
from .vocabulary import leading_token

Ids = NDArray[np.int32]
Spans = tuple[Span, ...]

_TAGS = ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")

_WHOLE, _REFUSED, _SILENT, _LOST = "whole", "refused", "silent", "lost"


@dataclass(frozen=True)
class _Written:
    """A document as text."""

    text: str
    answers: Spans | None = None
    """The assistant's characters, with the end of its turn; None in a text without turns."""
    begun: bool = False
    """Whether the text has the token that begins a text, as templates write it."""
    ended: bool = False
    """Whether the text has the token that ends a text, or is to have none."""


@dataclass
class Encoder:
    """Documents in, ids out.

    Args:
        tokenizer: the model's.
        template: the tokenizer's chat template, or the kphi-3 report's form.
        loss_on: every token, or only the assistant's turns and their ends.
        stops: tokens at which the model stops to generate, where they are known: in some templates
            an answer has no end but the tag of the next turn.
    """

    tokenizer: Any
    template: Literal["chat", "report"] = "chat"
    loss_on: Literal["all", "answers"] = "all"
    stops: frozenset[int] = frozenset()
    counts: Counter[str] = field(default_factory=Counter)
    """How many documents were not encoded as usual, by the reason."""
    _unwritten: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._chat = Chat(self.tokenizer)
        self._masks = Masks(self._chat)
        self._first = leading_token(self.tokenizer)
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        # Tokens that take in the space around them.
        self._greedy = [number for number, one in added.items() if one.lstrip or one.rstrip]

    def __call__(self, documents: Sequence[Document | None]) -> list[Ids]:
        """Return the ids of each document, (T,), none for one that is empty or not learned from."""
        written = [self._write(document) if document else _Written("") for document in documents]
        offsets = self.loss_on == "answers" and bool(getattr(self.tokenizer, "is_fast", False))
        encoded = self.tokenizer(
            [one.text for one in written],
            add_special_tokens=False,
            truncation=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )
        offsets_of = encoded["offset_mapping"] if offsets else [None] * len(written)
        return [
            self._finish(np.array(ids, dtype=np.int32), one, places)
            for ids, one, places in zip(encoded["input_ids"], written, offsets_of, strict=True)
        ]

    def text(self, document: Document) -> str:
        """Return a document as text, a conversation as its template writes it."""
        return self._write(document).text

    def clear(self) -> None:
        """Count from zero."""
        self.counts.clear()
        self._unwritten.clear()
        self._chat.clear()

    @property
    def key(self) -> str:
        """What the ids depend on besides the documents and the tokenizer's vocabulary."""
        template = self.tokenizer.chat_template if self.template == "chat" else self.template
        stops = sorted(self.stops) if self.loss_on == "answers" else ""
        return f"{self.loss_on} {stops} {template}"

    def notes(self, source: str) -> list[str]:
        """Return sentences about the documents that were not encoded as usual."""
        notes = [
            f"{source}: {sentence.format(self.counts[what])}"
            for what, sentence in _SENTENCES.items()
            if self.counts[what]
        ]
        if self._unwritten:
            unwritten = counted(self._unwritten)
            notes.append(f"{source}: not written without a chat template: {unwritten}.")
        return [*notes, *self._chat.notes(source)]

    def _write(self, document: Document) -> _Written:
        """Write a document, and find the answers in it."""
        if isinstance(document, str):
            report = self.template == "report"
            return _Written(document + "<|endoftext|>" * report, ended=report)
        if self.template == "report" or not getattr(self.tokenizer, "chat_template", None):
            self._count_unwritten(document)
            return _by_roles(document, report=self.template == "report")
        found = self._chat.write(document)
        if found is None:
            self.counts[_REFUSED] += 1
            self._count_unwritten(document)
            return _by_roles(document, report=False)
        text, answers = found.text, None
        if self.loss_on == "answers":
            spans, lost = self._masks.answers(found)
            answers = tuple(spans)
            self.counts[_LOST] += lost
        if document[-1].get("unfinished"):
            last = document[-1]["content"]
            last = last if last in text else last.strip()
            text = text[: text.rindex(last) + len(last)] if last in text else text
        return _Written(text, answers, begun=True, ended=True)

    def _count_unwritten(self, document: list[Message]) -> None:
        """Count what only chat templates write."""
        self._unwritten["tools"] += len(tools_of(document))
        self._unwritten["reasoning"] += sum("reasoning_content" in turn for turn in document)
        self._unwritten = +self._unwritten

    def _finish(
        self, ids: Ids, written: _Written, offsets: Sequence[tuple[int, int]] | None
    ) -> Ids:
        """Add the tokens that begin and end a text; mark those that are not learned."""
        if not len(ids):
            return ids
        learned = np.ones(len(ids), dtype=bool)
        if self.loss_on == "answers":
            if written.answers is None:
                self.counts[_WHOLE] += 1
            elif offsets is None:
                text = written.text
                learned = inside_by_pieces(self.tokenizer, text, ids.tolist(), written.answers)
            else:
                learned = within(self._places(ids, written.text, offsets), written.answers)
            if self.stops and written.begun:
                self._learn_stops(ids, learned)
        last = self.tokenizer.eos_token_id
        if not written.begun and self._first is not None and ids[0] != self._first:
            ids, learned = np.insert(ids, 0, self._first), np.insert(learned, 0, False)
        if not written.ended and last is not None and ids[-1] != last:
            ids, learned = np.append(ids, np.int32(last)), np.append(learned, learned[-1])
        if not learned[1:].any():
            self.counts[_SILENT] += 1
            return ids[:0]
        return np.where(learned, ids, ~ids)

    def _learn_stops(self, ids: Ids, learned: NDArray[np.bool_]) -> None:
        """Learn the token after an answer, too, where that token ends it; in place."""
        stops = np.isin(ids, list(self.stops))
        after = np.flatnonzero(learned[:-1] & ~learned[1:]) + 1
        for index in after[stops[after]]:
            if not stops[max(0, index - 2) : index].any():  # an end, and perhaps a line end
                learned[index] = True

    def _places(self, ids: Ids, text: str, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
        """Return the offsets of each token, (T, 2), without the space that it has taken in."""
        places = np.array(offsets)
        for index in np.flatnonzero(np.isin(ids, self._greedy)):
            start, end = places[index]
            token = text[start:end]
            if token.strip():
                places[index] += len(token) - len(token.lstrip()), len(token.rstrip()) - len(token)
        return places


def _by_roles(document: list[Message], *, report: bool) -> _Written:
    """Write a conversation without a chat template.

    Args:
        document: the conversation; roles of any name get a tag.
        report: whether in the kphi-3 report's form, else as paragraphs.
    """
    text, spans = "", []
    for turn in document:
        text += f"<|{turn['role']}|>" if report else "\n\n" if text else ""
        start = len(text)
        text += "\n".join(filter(None, (turn["content"], calls_as_text(turn))))
        if report and not turn.get("unfinished"):
            text += "<|end|>"
        if turn["role"] == "assistant":
            spans.append((start, len(text)))
    unfinished = bool(document[-1].get("unfinished"))
    if report and not unfinished:
        text += "<|endoftext|>"
        if document[-1]["role"] == "assistant":
            spans[-1] = spans[-1][0], len(text)
    return _Written(text, tuple(spans), ended=report or unfinished)


def report_notes(tokenizer: Any) -> list[str]:
    """Return a sentence about the report's tags that are several tokens, if there are any."""
    several = [
        tag for tag in _TAGS if len(tokenizer(tag, add_special_tokens=False)["input_ids"]) > 1
    ]
    if not several:
        return []
    return [
        f"template report: the tokenizer has no token for {', '.join(several)}; each is several "
        "tokens."
    ]


_SENTENCES = {
    _REFUSED: (
        "the chat template refuses {} conversations, such as ones that do not alternate between "
        "user and assistant; they were written as plain text."
    ),
    _WHOLE: "{} documents are plain text without turns; the loss falls on all of each.",
    _LOST: (
        "{} answers cannot be found in what the chat template writes, and were not learned from."
    ),
    _SILENT: "{} documents hold nothing to learn from, such as no answer, and were left out.",
}
