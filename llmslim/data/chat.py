"""Write conversations out by a tokenizer's chat template, and find what it does not write.

Templates differ in what they expect of a turn that calls a tool (no content, or an empty one;
arguments as an object, or as JSON text), of a system turn (some refuse it), and of content (a text,
or parts). So a conversation is given to the template in one way after the other, until it writes
everything. What it writes is known by marks: put in place of every text of a conversation, they
are there in what comes out, or not. That depends on the conversation's shape alone and is asked
once for each shape.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from jinja2 import TemplateError

from .messages import Document, Message, replace_surrogates, strings_in, tools_of

Turn = dict[str, Any]

REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""What a template ends in when it is given what it was not written for."""
MARK = "\ue000\ue001{}\ue002\ue000"  # private use: no template has it, no text
_SHAPES = 4096


@dataclass(frozen=True)
class Written:
    """A conversation as the template writes it."""

    text: str
    turns: list[Turn]
    """The messages as the template was given them."""
    tools: list[dict[str, Any]]


@dataclass
class Chat:
    """A tokenizer's chat template.

    Args:
        tokenizer: one that has a template.
    """

    tokenizer: Any
    unwritten: Counter[str] = field(default_factory=Counter)
    """What the template does not write, and how often it was there."""
    moved: int = 0
    """Conversations whose system prompt was put into the first turn of the user."""
    halved: bool = False
    """Whether the template itself writes half of a surrogate pair."""
    _known: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By a conversation's shape, what is missing of it."""
    _best_way: dict[str, int] = field(default_factory=dict)
    """By a conversation's shape, which of the ways writes the most of it."""

    def write(self, document: Document) -> Written | None:
        """Return what the template makes of a conversation, None if it refuses it in any way."""
        turns: list[Turn] = [dict(turn) for turn in cast(list[Message], document)]
        tools = tools_of(document)
        shape = _shape(turns, tools)
        best: tuple[int, Written, tuple[str, ...], bool] | None = None
        for number, (form, moved) in enumerate(_ways(turns)):
            if self._best_way.get(shape, number) != number:
                continue
            try:
                text = self.apply(form, tools)
            except REFUSALS:
                continue
            if "'type': 'text'}" in text:  # parts that the template took for a text
                continue
            missing = self._missing(form, tools, text)
            if best is None or len(missing) < len(best[2]):
                best = number, Written(text, form, tools), missing, moved
            if not missing:
                break
        if best is None:
            return None
        if len(self._best_way) > _SHAPES:
            self._best_way.clear()
        self._best_way[shape], written, missing, moved = best
        self.moved += moved
        self.unwritten.update(missing)
        return written

    def apply(self, turns: Sequence[Turn], tools: list[dict[str, Any]], **options: Any) -> str:
        """Return what the template makes of some turns.

        Raises:
            Exception: one of REFUSALS, if it does not make anything of them.
        """
        if tools:
            options["tools"] = tools
        text = str(self.tokenizer.apply_chat_template(list(turns), tokenize=False, **options))
        whole = replace_surrogates(text)
        self.halved = self.halved or whole is not text
        return whole

    def notes(self, source: str) -> list[str]:
        """Return sentences about what was not written as it is."""
        notes = []
        if self.unwritten:
            what = ", ".join(f"{what} ({count})" for what, count in self.unwritten.items())
            notes.append(f"{source}: the chat template does not write {what}.")
        if self.halved:
            notes.append(
                f"{source}: the chat template writes half of a surrogate pair, as of a cut emoji; "
                "it was replaced by U+FFFD."
            )
        if self.moved:
            notes.append(
                f"{source}: the chat template has no system turn; in {self.moved} conversations "
                "the system prompt was put at the beginning of the user's first turn."
            )
        return notes

    def _missing(
        self, turns: list[Turn], tools: list[dict[str, Any]], text: str
    ) -> tuple[str, ...]:
        """Return what is not written, a name for each turn or tool that something is missing of."""
        marks = _Marks()
        marked, marked_tools = marks.turns(turns), marks.tools(tools)
        shape = _json([marked, marked_tools])
        if shape not in self._known:
            try:
                with_marks = self.apply(marked, marked_tools)
            except REFUSALS:  # not of the marks' making: the texts themselves are looked for
                return tuple(name for name, said in marks.texts if not _says(text, said))
            if len(self._known) > _SHAPES:
                self._known.clear()
            self._known[shape] = tuple(
                name
                for index, (name, _) in enumerate(marks.texts)
                if MARK.format(index) not in with_marks
            )
        missing = self._known[shape]
        # What is thought within the content is not known by the shape.
        said = ["".join(strings_in(turn.get("content"))) for turn in turns]
        thought = sum("</think>" in one and not _says(text, one) for one in said)
        repr_of = [
            repr(arguments)
            for turn in turns
            for call in turn.get("tool_calls") or ()
            if isinstance(arguments := call["function"].get("arguments"), dict) and arguments
        ]
        as_python = sum(one in text for one in repr_of if one != _json(one))
        return (*missing, *["reasoning"] * thought, *["arguments of calls as JSON"] * as_python)


def _shape(turns: list[Turn], tools: list[dict[str, Any]]) -> str:
    """Return what conversations share that differ in their texts only."""
    marks = _Marks()
    return _json([marks.turns(turns), marks.tools(tools)])


class _Marks:
    """Puts marks in place of texts, and knows what each stands for."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, str]] = []

    def turns(self, turns: list[Turn]) -> list[Turn]:
        """Return turns with marks in place of what they say."""
        marked = []
        for turn in turns:
            role = turn["role"]
            new = dict(turn)
            for key, value in turn.items():
                if key == "tool_calls":
                    new[key] = [self._call(call) for call in value]
                elif key == "content":
                    new[key] = self._content(value, f"turns of {role}")
                elif key.startswith("reasoning") or key == "thinking":
                    new[key] = self._text("reasoning", value)
                elif key not in _NOT_SAID and isinstance(value, str):
                    new[key] = self._text(f"`{key}` of turns", value)
            marked.append(new)
        return marked

    def tools(self, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return tools with marks in place of their names."""
        marked = []
        for tool in tools:
            function = tool.get("function")
            if isinstance(function, dict) and "name" in function:
                name = self._text("tools", str(function["name"]))
                tool = {**tool, "function": {**function, "name": name}}
            marked.append(tool)
        return marked

    def _content(self, content: Any, name: str) -> Any:
        if isinstance(content, list):
            return [{**part, "text": self._text(name, part["text"])} for part in content]
        return self._text(name, content) if content else content

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        name = self._text("calls of tools", str(function.get("name", "")))
        given = function.get("arguments")
        arguments: Any = given
        if isinstance(given, dict):
            arguments = {
                key: self._text("arguments of calls", _json(one)) for key, one in given.items()
            }
        elif isinstance(given, str) and given:
            said = self._text("arguments of calls", given)
            arguments = _json({said: said}) if given[:1] == "{" else said
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def _text(self, name: str, said: str) -> str:
        self.texts.append((name, said))
        return MARK.format(len(self.texts) - 1)


_NOT_SAID = {"role", "name", "id", "tool_call_id", "unfinished"}


def _ways(turns: list[Turn]) -> Iterator[tuple[list[Turn], bool]]:
    """Yield the forms in which a conversation is given to a template, the usual one first.

    With each comes whether its system prompt is in a turn of the user.
    """
    yield turns, False
    if any(turn.get("tool_calls") for turn in turns):
        silent = [
            {k: v for k, v in turn.items() if k != "content" or v or not turn.get("tool_calls")}
            for turn in turns
        ]
        yield from ((form, False) for form in (silent, _as_text(turns), _as_text(silent)))
    asked = next((n for n, turn in enumerate(turns) if turn["role"] == "user"), None)
    if turns[0]["role"] == "system" and asked is not None and len(turns) > 1:
        merged = [dict(turn) for turn in turns[1:]]
        first = merged[asked - 1]
        first["content"] = f"{turns[0]['content']}\n\n{first['content']}"
        yield merged, True
    yield (
        [
            {**turn, "content": [{"text": turn["content"], "type": "text"}]}
            if turn.get("content")
            else turn
            for turn in turns
        ],
        False,
    )


def _as_text(turns: list[Turn]) -> list[Turn]:
    """Return turns with the arguments of calls as JSON text."""
    return [
        {**turn, "tool_calls": [_call_as_text(call) for call in turn["tool_calls"]]}
        if turn.get("tool_calls")
        else turn
        for turn in turns
    ]


def _call_as_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return call
    return {**call, "function": {**function, "arguments": _json(arguments)}}


def calls_as_text(turn: Any) -> str:
    """Return the calls of tools in a turn as lines of JSON, for text without a template."""
    calls = [call["function"] for call in turn.get("tool_calls") or ()]
    return "\n".join(
        _json({"name": call.get("name"), "arguments": call.get("arguments")}) for call in calls
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _says(text: str, said: str) -> bool:
    """Tell whether a text holds what was said, as it is or as JSON."""
    return said.strip() in text or _json(said.strip())[1:-1] in text
