"""Find the assistant's turns in a conversation that a chat template has written.

Where the template marks them, by `{% generation %}`, those marks count. Otherwise they are found by
writing parts of the conversation and changed ones:

- An answer begins after the text that the template writes for the turns before it with its
  generation prompt, and ends where the text that it writes up to this turn ends, if the whole text
  begins with both.
- If it does not, since the template writes something at the very end only, rewrites earlier turns,
  or puts the system prompt or tools elsewhere, the conversation is written once more with a mark in
  place of the answer: what differs is the answer. The generation prompt, or the beginning of it, is
  looked for before it, the end of a turn after it.
- The end of a turn within a conversation is what the template writes after an answer both where
  another turn follows and where none does; where these have nothing in common, what it writes
  whatever the next role, without the beginning of the next turn.

Nothing before the generation prompt of the first answer is ever the assistant's, so no default
system prompt is, even where the assistant has the first turn.
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

from .chat import MARK, Chat, Turn, Written

Span = tuple[int, int]
"""Begin and end of a stretch, in characters."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKUP = r"<[^<>\s]{1,64}>|\[[^\[\]\s]{1,64}\]"
"""Tags as chat templates have them; a common part of two texts does not end within one."""
_EMPTY_FRAME = re.compile(r"(?:\s|<[^<>\s]+>)*")
"""What may be between a turn's header and its text, such as an empty thought."""
_ANSWER = MARK.format("answer")
_ROLES = {"system", "developer", "user", "assistant"}
"""All but tools."""


class Masks:
    """Finds answers in the text that a chat template writes.

    Args:
        chat: the template.
    """

    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    def answers(self, written: Written) -> tuple[list[Span], int]:
        """Return the assistant's characters, and how many of its turns were not found."""
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
        """The generation prompt."""
        question = [{"role": "user", "content": MARK.format("question")}]
        without = self._chat.apply(question, [])
        prompt = self._chat.apply(question, [], add_generation_prompt=True)
        if without is None or prompt is None:
            return ""
        return prompt[self.common(prompt, without) :]

    @cached_property
    def end_of_turn(self) -> str:
        """What the template writes after an answer that another turn follows."""
        talk = [
            {"role": role, "content": MARK.format(number)}
            for number, role in enumerate(("user", "assistant", "user", "assistant"))
        ]
        after = self._after(talk, upto=talk[2]["content"])
        if not after:
            return ""
        found = self.common(after, self._after(talk[:2]) or "")
        if found:
            return after[:found]
        others = [
            self._after([*talk[:2], {**talk[2], "role": role}])
            for role in ("assistant", "tool", "system")
        ]
        known = [other for other in others if other is not None]
        for other in known:
            after = after[: self.common(after, other)]
        return self.without_header(after) if known else ""

    def without_header(self, text: str) -> str:
        """Return a text without the beginning of the assistant's next header, if it ends in one."""
        for length in range(len(self.prompt), 0, -1):
            if text.endswith(self.prompt[:length]):
                return text[:-length]
        return text

    def upto_eos(self, text: str, span: Span) -> Span:
        """Return a span without the tags of the next turn after the token that ends a text."""
        eos = getattr(self._chat.tokenizer, "eos_token", None)
        at = text.rfind(eos, *span) + len(eos) if eos and eos in text[slice(*span)] else span[1]
        after = text[at : span[1]]
        return (span[0], at) if after.strip() and _EMPTY_FRAME.fullmatch(after) else span

    def _after(self, talk: list[Turn], upto: str = "") -> str | None:
        """Return the text after the second turn's, None if the template does not write it."""
        text = self._chat.apply(talk, [])
        _, found, after = (text or "").partition(talk[1]["content"])
        return after.partition(upto)[0] if found and upto else after if found else None

    @cached_property
    def _markup(self) -> re.Pattern[str]:
        added = getattr(self._chat.tokenizer, "added_tokens_decoder", {}).values()
        whole = sorted({re.escape(str(token)) for token in added}, key=len, reverse=True)
        return re.compile("|".join([*whole, _MARKUP]))

    def common(self, one: str, other: str) -> int:
        """Return the length of the common beginning, not ending within a tag of either text."""
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
        """Return where the generation prompt before a place ends, that place if there is none.

        The part of the prompt before any of its tags counts, too: some prompts end in the beginning
        of a thought, which an answer without one does not have.
        """
        ends = {len(self.prompt), *(tag.start() for tag in self._markup.finditer(self.prompt))}
        for end in sorted(ends - {0}, reverse=True):
            begin = text.rfind(self.prompt[:end], 0, at)
            if begin >= 0 and _EMPTY_FRAME.fullmatch(text, begin + end, at):
                return begin + end
        return at


class _Answer:
    """One turn of a conversation that a template has written.

    Args:
        masks: of the template.
        chat: the template.
        written: the conversation.
        index: the turn's number.
    """

    def __init__(self, masks: Masks, chat: Chat, written: Written, index: int) -> None:
        self._masks, self._chat, self._tools = masks, chat, written.tools
        self._turns, self._text, self._index = written.turns, written.text, index
        self._turn, self._following = self._turns[index], self._turns[index + 1 :]

    def spans(self) -> list[Span]:
        """Return its characters, none if they are not found or it is empty."""
        span = self._span()
        if span is None:
            return []
        found = self._without_replies(span) if self._turn.get("tool_calls") else [span]
        return [self._masks.upto_eos(self._text, one) for one in found]

    def _span(self) -> Span | None:
        """Return where it begins and ends, None if that is not found or it is empty."""
        if not self._turn.get("content") and self._with(_changed(self._turn)) == self._text:
            return None  # a call of a tool that the template does not write
        begin, end = self._begin(), self._end()
        if begin is None or end is None:
            region = self._region()
            if region is None:
                return None
            if begin is None:
                begin = self._masks.header_end(self._text, region[0])
            if end is None:
                end = region[1] + self._ending(region[1])
        elif begin == end:
            return None
        return begin, end

    def _begin(self) -> int | None:
        """Return the length of the text before it, None if the template rewrites that."""
        if not self._index:
            return None
        before = self._apply(self._turns[: self._index], add_generation_prompt=True)
        if before is None:
            return None
        same = _same(before, self._text)
        # A template that is laid out in lines may end its prompt in more of them.
        return same if same == len(before) or before[same - 1 :].isspace() else None

    def _end(self) -> int | None:
        """Return the length of the text up to its end, None if the template rewrites that."""
        if not self._following:
            return len(self._text)
        upto = self._apply(self._turns[: self._index + 1])
        if upto is None or not self._text.startswith(upto):
            return None
        end, ending = len(upto), self._masks.end_of_turn
        missing = ending and not upto.endswith(ending.rstrip())
        return end + len(ending) if missing and self._text.startswith(ending, end) else end

    def _ending(self, at: int) -> int:
        """Return how many characters after its text belong to it."""
        ending = self._masks.end_of_turn
        if ending and self._text.startswith(ending, at):
            return len(ending)
        upto = self._apply(self._turns[: self._index + 1])
        if upto is None:
            return 0
        written = Written(upto, self._turns[: self._index + 1], self._tools)
        region = _Answer(self._masks, self._chat, written, self._index)._region()
        return 0 if region is None else self._masks.common(self._text[at:], upto[region[1] :])

    def _region(self, other: Turn | None = None) -> Span | None:
        """Return which characters change with the turn's words, or with `other` in its place."""
        for one in [other] if other else [_replaced(self._turn), _changed(self._turn)]:
            changed = self._with(one)
            if changed is None or changed == self._text:
                continue
            begin = _same(self._text, changed)
            most = min(len(self._text), len(changed)) - begin
            same = min(_same(self._text[::-1], changed[::-1]), most)
            if "\ue000" in changed[begin : len(changed) - same]:
                return begin, len(self._text) - same
        return None

    def _without_replies(self, span: Span) -> list[Span]:
        """Return a span of a turn that calls tools without the tools' replies, if it has them.

        Templates may write the name of a function before its reply, and the assistant's content
        of a call after it.
        """
        begin, end = span
        replies = list(itertools.takewhile(lambda one: one["role"] not in _ROLES, self._following))
        without = self._apply([*self._turns[: self._index + 1], *self._following[len(replies) :]])
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
        if not regions:
            named = self._region(_changed(self._turn, names=False))
            return [(begin, calls) if named and named[1] <= calls < end else span]
        content = self._turn.get("content")
        own = self._region({**self._turn, "content": _ANSWER}) if content else None
        found = [(begin, min(calls, regions[0][0]))]
        if own is not None and regions[-1][1] <= own[0]:
            found.append((own[0], end))
        return [one for one in found if one[0] < one[1]]

    def _with(self, other: Turn) -> str | None:
        """Return the conversation as it is written with another turn in place of this one."""
        return self._apply([*self._turns[: self._index], other, *self._following])

    def _apply(self, turns: Sequence[Turn], **options: Any) -> str | None:
        return self._chat.apply(turns, self._tools, **options)


def _replaced(turn: Turn) -> Turn:
    """Return a turn with a mark as its content, and nothing else."""
    parts = isinstance(turn.get("content"), list)
    content = [{"type": "text", "text": _ANSWER}] if parts else _ANSWER
    return {"role": turn["role"], "content": content}


def _changed(turn: Turn, *, names: bool = True) -> Turn:
    """Return a turn with the same parts in other words: for templates that count calls.

    Args:
        turn: the assistant's.
        names: whether other functions are called, else the same with other arguments.
    """
    changed = dict(turn)
    if isinstance(turn.get("content"), str) and turn["content"]:
        changed["content"] = _ANSWER
    for key in {"reasoning_content", "reasoning", "thinking"} & turn.keys():
        changed[key] = _ANSWER
    if "tool_calls" in turn:
        functions = [dict(call["function"]) for call in turn["tool_calls"]]
        for function in functions:
            if names:
                function["name"] = _ANSWER
            elif isinstance(function.get("arguments"), dict):
                function["arguments"] = dict.fromkeys(function["arguments"], _ANSWER)
        changed["tool_calls"] = [
            {**call, "function": function}
            for call, function in zip(turn["tool_calls"], functions, strict=True)
        ]
    return changed


def within(offsets_T2: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Return which tokens reach into one of the spans, (T,); beginning before it is enough."""
    starts, ends = offsets_T2.T
    inside = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        inside |= (ends > start) & (starts < end)
    return inside


def inside_by_pieces(
    tokenizer: Any, text: str, ids: Sequence[int], spans: Sequence[Span]
) -> NDArray[np.bool_]:
    """Return which tokens reach into one of the spans, (T,), for a tokenizer without offsets.

    The text up to a border is tokenised: its common beginning with the whole is before the border.
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
    """Return the length of the common beginning of two sequences."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
