"""Find where the assistant speaks in a conversation that a chat template has written out.

Where the template marks it itself, by `{% generation %}`, those marks count. Otherwise it is found
from outside, by writing parts of the conversation and changed ones:

- An answer begins behind what the template writes of the turns before it with its generation
  prompt, and ends where what it writes up to this turn ends, if both are beginnings of the whole.
- If they are not, since the template writes something at the very end only, rewrites earlier turns,
  or puts the system prompt or tools elsewhere, the conversation is written once more with a mark in
  place of the answer: what differs is the answer. In front of it the generation prompt, or the
  beginning of it, is looked for; behind it what ends a turn.
- What ends a turn within a conversation is what the template writes behind an answer both where
  another turn follows and where none does; where these have nothing in common, what it writes
  whoever speaks next, without the beginning of the next turn.

Nothing before the generation prompt of the first answer is ever the assistant's, so no default
system prompt is, even where the assistant speaks first.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmslim.compat import render_with_answers

from .chat import MARK, REFUSALS, Chat, Turn, Written

Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKUP = r"<[^<>\s]{1,64}>|\[[^\[\]\s]{1,64}\]"
"""Tags as chat templates have them; what is common to two texts does not end within one."""
_EMPTY_FRAME = re.compile(r"(?:\s|<[^<>\s]+>)*")
"""What may stand between a turn's header and its text, such as an empty thought."""
_ANSWER = MARK.format("answer")
_SPEAKERS = {"system", "developer", "user", "assistant"}
"""Who speaks besides tools."""


class Masks:
    """Finds answers in what a chat template writes.

    Args:
        chat: the template.
    """

    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    def answers(self, written: Written) -> tuple[list[Span], int]:
        """Return which characters are the assistant's, and how many of its turns were not found."""
        marked = self._by_the_template(written)
        if marked is not None:
            return marked, 0
        spans, lost = [], 0
        for index, turn in enumerate(written.turns):
            if turn["role"] == "assistant":
                found = _Answer(self, self._chat, written, index).spans()
                spans += found
                lost += not found
        return spans, lost

    def _by_the_template(self, written: Written) -> list[Span] | None:
        """Return what the template marks as the assistant's, None if it marks nothing."""
        tokenizer = self._chat.tokenizer
        template = tokenizer.get_chat_template(None, written.tools or None)
        if not _GENERATION.search(template):
            return None
        turns = [{k: v for k, v in turn.items() if v is not None} for turn in written.turns]
        options: dict[str, Any] = {**tokenizer.special_tokens_map, "tools": written.tools or None}
        text, spans = render_with_answers(turns, template, options)
        return spans if text == written.text else None

    @cached_property
    def prompt(self) -> str:
        """What the template writes to make the assistant speak."""
        asked = [{"role": "user", "content": MARK.format("question")}]
        try:
            without = self._chat.apply(asked, [])
            prompt = self._chat.apply(asked, [], add_generation_prompt=True)
        except REFUSALS:
            return ""
        return prompt[self.common(prompt, without) :]

    @cached_property
    def end_of_turn(self) -> str:
        """What the template writes behind an answer that another turn follows."""
        talk = [
            {"role": role, "content": MARK.format(number)}
            for number, role in enumerate(("user", "assistant", "user", "assistant"))
        ]
        behind = self._behind(talk, 1, upto=talk[2]["content"])
        if not behind:
            return ""
        found = self.common(behind, self._behind(talk[:2], 1) or "")
        if found:
            return behind[:found]
        common = behind
        others = 0
        for role in ("assistant", "tool", "system"):
            another = self._behind([*talk[:2], {**talk[2], "role": role}], 1)
            if another is not None:
                common = common[: self.common(common, another)]
                others += 1
        if not others:
            return ""
        return self.without_header(common)

    def without_header(self, text: str) -> str:
        """Return a text without what it ends in of the assistant's header: the next one begins."""
        for length in range(len(self.prompt), 0, -1):
            if text.endswith(self.prompt[:length]):
                return text[:-length]
        return text

    def upto_eos(self, text: str, span: Span) -> Span:
        """Return a span without the tags of the next turn behind the token that ends a text."""
        eos = getattr(self._chat.tokenizer, "eos_token", None)
        at = text.rfind(eos, *span) + len(eos) if eos and eos in text[slice(*span)] else span[1]
        behind = text[at : span[1]]
        return (span[0], at) if behind.strip() and _EMPTY_FRAME.fullmatch(behind) else span

    def _behind(self, talk: list[Turn], index: int, upto: str = "") -> str | None:
        """Return what is written behind a turn's text, None if the template refuses."""
        try:
            text = self._chat.apply(talk, [])
        except REFUSALS:
            return None
        _, found, behind = text.partition(talk[index]["content"])
        return behind.partition(upto)[0] if found and upto else behind if found else None

    @cached_property
    def _markup(self) -> re.Pattern[str]:
        added = getattr(self._chat.tokenizer, "added_tokens_decoder", {}).values()
        whole = sorted({re.escape(str(token)) for token in added}, key=len, reverse=True)
        return re.compile("|".join([*whole, _MARKUP]))

    def common(self, one: str, other: str) -> int:
        """Return how long two texts are the same, not ending within a tag of either."""
        length = _same(one, other)
        return min(self._before_tag(text, length) for text in (one, other))

    def _before_tag(self, text: str, at: int) -> int:
        if at == len(text):
            return at
        for tag in self._markup.finditer(text, max(0, at - 128), at + 128):
            if tag.start() < at < tag.end():
                return tag.start()
        return at

    def header_end(self, text: str, at: int) -> int:
        """Return where the generation prompt in front of a place ends, that place if there is none.

        Of the prompt, what is before any of its tags may do: some prompts go on with the beginning
        of a thought, which an answer without one does not have.
        """
        ends = {len(self.prompt), *(tag.start() for tag in self._markup.finditer(self.prompt))}
        for end in sorted(ends - {0}, reverse=True):
            begin = text.rfind(self.prompt[:end], 0, at)
            if begin >= 0 and _EMPTY_FRAME.fullmatch(text, begin + end, at):
                return begin + end
        return at


class _Answer:
    """One turn of the assistant in a conversation that is written out."""

    def __init__(self, masks: Masks, chat: Chat, written: Written, index: int) -> None:
        self._masks, self._chat, self._tools = masks, chat, written.tools
        self._turns, self._text, self._index = written.turns, written.text, index

    def spans(self) -> list[Span]:
        """Return which characters it has, none if they are not found or say nothing."""
        span = self._span()
        if span is None:
            return []
        found = (
            self._without_replies(span) if self._turns[self._index].get("tool_calls") else [span]
        )
        return [self._masks.upto_eos(self._text, one) for one in found]

    def _span(self) -> Span | None:
        """Return where it begins and ends, None if that is not found or it says nothing."""
        turn = self._turns[self._index]
        if not turn.get("content") and self._apply(self._with(_changed(turn))) == self._text:
            return None  # a call of a tool that the template does not write
        begin, end = self._begin(), self._end()
        if begin is None or end is None:
            region = self._region()
            if region is None:
                return None
            if begin is None:
                begin = self._masks.header_end(self._text, region[0])
            if end is None:
                end = region[1] + self._behind(region[1])
        elif begin == end:
            return None
        return begin, end

    def _begin(self) -> int | None:
        """Return the length of what is before it, None if that is not as it was without it."""
        if not self._index:
            return None
        before = self._apply(self._turns[: self._index], add_generation_prompt=True)
        if before is None:
            return None
        same = _same(before, self._text)
        if same == len(before):
            return same
        # A template that is laid out in lines may end its prompt in more of them.
        return same if before[same - 1 :].isspace() else None

    def _end(self) -> int | None:
        """Return the length of what is up to its end, None if that is not as it was then."""
        if self._index == len(self._turns) - 1:
            return len(self._text)
        behind = self._apply(self._turns[: self._index + 1])
        if behind is None or not self._text.startswith(behind):
            return None
        end, ending = len(behind), self._masks.end_of_turn
        missing = ending and not behind.endswith(ending.rstrip())
        return end + len(ending) if missing and self._text.startswith(ending, end) else end

    def _behind(self, at: int) -> int:
        """Return how much of what is behind its text belongs to it."""
        ending = self._masks.end_of_turn
        if ending and self._text.startswith(ending, at):
            return len(ending)
        alone = self._apply(self._turns[: self._index + 1])
        if alone is None:
            return 0
        written = Written(alone, self._turns[: self._index + 1], self._tools)
        region = _Answer(self._masks, self._chat, written, self._index)._region()
        return 0 if region is None else self._masks.common(self._text[at:], alone[region[1] :])

    def _region(self, others: Sequence[Turn] = ()) -> Span | None:
        """Return which characters change when it says something else, as one of `others`."""
        turn = self._turns[self._index]
        for other in others or (_saying(turn), _changed(turn)):
            changed = self._apply(self._with(other))
            if changed is None or changed == self._text:
                continue
            begin = _same(self._text, changed)
            most = min(len(self._text), len(changed)) - begin
            same = min(_same(self._text[::-1], changed[::-1]), most)
            if "\ue000" in changed[begin : len(changed) - same]:
                return begin, len(self._text) - same
        return None

    def _without_replies(self, span: Span) -> list[Span]:
        """Return a span of a turn that calls tools without what they say, where that is in it.

        Templates may write the name of a function before what it says, and what the assistant says
        beside a call behind that.
        """
        begin, end = span
        turn, following = self._turns[self._index], self._turns[self._index + 1 :]
        replies = list(itertools.takewhile(lambda one: one["role"] not in _SPEAKERS, following))
        without = self._apply([*self._turns[: self._index + 1], *following[len(replies) :]])
        if not replies or without is None:
            return [span]
        same = self._masks.common(self._text[begin:], without[begin:])
        calls = begin + len(self._masks.without_header(self._text[begin : begin + same]))
        written = Written(self._text, self._turns, self._tools)
        regions = [
            region
            for number in range(self._index + 1, self._index + 1 + len(replies))
            if (region := _Answer(self._masks, self._chat, written, number)._region()) is not None
            and begin <= region[0] < end
        ]
        named = self._region([_changed(turn, names=False)])
        if not regions:
            return [(begin, calls) if named and named[1] <= calls < end else span]
        said = self._region([{**turn, "content": _ANSWER}]) if turn.get("content") else None
        behind = said is not None and regions[-1][1] <= said[0]
        found = [(begin, min(calls, regions[0][0])), (said[0], end) if said and behind else (0, 0)]
        return [one for one in found if one[0] < one[1]]

    def _with(self, other: Turn) -> list[Turn]:
        """Return the conversation with another turn in place of this one."""
        return [*self._turns[: self._index], other, *self._turns[self._index + 1 :]]

    def _apply(self, turns: Sequence[Turn], **options: Any) -> str | None:
        try:
            return self._chat.apply(turns, self._tools, **options)
        except REFUSALS:
            return None


def _saying(turn: Turn) -> Turn:
    """Return a turn that says something else, in words alone."""
    parts = isinstance(turn.get("content"), list)
    content = [{"type": "text", "text": _ANSWER}] if parts else _ANSWER
    return {"role": turn["role"], "content": content}


def _changed(turn: Turn, *, names: bool = True) -> Turn:
    """Return a turn that does the same, with other words: for templates that count calls.

    Args:
        turn: the assistant's.
        names: whether it is other functions that are called, else the same with other arguments.
    """
    changed = dict(turn)
    if isinstance(turn.get("content"), str) and turn["content"]:
        changed["content"] = _ANSWER
    for key in {"reasoning_content", "reasoning", "thinking"} & turn.keys():
        changed[key] = _ANSWER
    if "tool_calls" in turn:
        changed["tool_calls"] = [
            {**call, "function": {**call["function"], **_other(call["function"], names=names)}}
            for call in turn["tool_calls"]
        ]
    return changed


def _other(function: dict[str, Any], *, names: bool) -> dict[str, Any]:
    """Return another name for a function, or other arguments of the same names."""
    given = function.get("arguments")
    if names:
        return {"name": _ANSWER}
    return {"arguments": dict.fromkeys(given, _ANSWER)} if isinstance(given, dict) else {}


def within(offsets_T2: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Tell which tokens reach into one of the spans; one that only begins before it does."""
    starts, ends = offsets_T2.T
    inside = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        inside |= (ends > start) & (starts < end)
    return inside


def inside_by_pieces(
    tokenizer: Any, text: str, ids: Sequence[int], spans: Sequence[Span]
) -> NDArray[np.bool_]:
    """Tell which tokens reach into one of the spans, with a tokenizer that gives no offsets.

    The text up to a border is tokenised: what it has in common with the whole is before the border.
    """

    def upto(at: int) -> tuple[int, bool]:
        some = tokenizer(text[:at], add_special_tokens=False)["input_ids"]
        same = _same(some, ids)
        return same, same < len(some)

    inside = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        last, across = upto(end)
        inside[upto(start)[0] : last + across] = True
    return inside


def _same(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many of the first items two sequences share."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
