"""Write conversations with a tokenizer's chat template, and find what it does not write.

Templates differ in what they expect of a turn that calls a tool (no content, or an empty one;
arguments as an object, or as JSON text), of a system turn (some refuse it), and of content (a text,
or parts). So a conversation is given to the template in one form after the other, until it writes
everything. Marks find what it writes: put in place of every text of a conversation, they are in the
result, or not. That depends on the conversation's shape alone and is tried once for each shape.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from jinja2 import TemplateError

from .columns import counted
from .messages import Document, Message, replace_surrogates, strings_in, tools_of

Turn = dict[str, Any]

MARK = "\ue000\ue001{}\ue002\ue000"  # private use: no template has it, no text
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""What a template raises for a conversation that it was not written for."""
_SHAPES = 4096
_NOT_TEXT = {"role", "name", "id", "tool_call_id", "unfinished"}


@dataclass(frozen=True)
class Written:
    """A conversation as the template writes it."""

    text: str
    turns: list[Turn]
    """The messages in the form that the template was given."""
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
    surrogates: bool = False
    """Whether the template itself writes half of a surrogate pair."""
    _missing_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By a conversation's shape, what is missing of it."""
    _best_form: dict[str, int] = field(default_factory=dict)
    """By a conversation's shape, the form of which the template writes the most."""

    def write(self, document: Document) -> Written | None:
        """Return a conversation as the template writes it, None if it refuses every form."""
        turns: list[Turn] = [dict(turn) for turn in cast(list[Message], document)]
        tools = tools_of(document)
        shape = _Marked(turns, tools).shape
        best: tuple[int, Written, tuple[str, ...], bool] | None = None
        for number, (form, moved) in enumerate(_forms(turns)):
            if self._best_form.get(shape, number) != number:
                continue
            text = self.apply(form, tools)
            if text is None or "'type': 'text'}" in text:  # parts that it took for a text
                continue
            missing = self._missing(form, tools, text)
            if best is None or len(missing) < len(best[2]):
                best = number, Written(text, form, tools), missing, moved
            if not missing:
                break
        if best is None:
            return None
        if len(self._best_form) > _SHAPES:
            self._best_form.clear()
        self._best_form[shape], written, missing, moved = best
        self.moved += moved
        self.unwritten.update(missing)
        return written

    def apply(
        self, turns: Sequence[Turn], tools: list[dict[str, Any]], **options: Any
    ) -> str | None:
        """Return what the template writes for some turns, None if it refuses them."""
        if tools:
            options["tools"] = tools
        try:
            text = str(self.tokenizer.apply_chat_template(list(turns), tokenize=False, **options))
        except _REFUSALS:
            return None
        clean = replace_surrogates(text)
        self.surrogates = self.surrogates or clean is not text
        return clean

    def clear(self) -> None:
        """Count from zero."""
        self.unwritten.clear()
        self.moved, self.surrogates = 0, False

    def notes(self, source: str) -> list[str]:
        """Return sentences about what was not written, or changed."""
        notes = []
        if self.unwritten:
            notes.append(f"the chat template does not write {counted(self.unwritten)}.")
        if self.surrogates:
            notes.append(
                "the chat template writes half of a surrogate pair, as of a cut emoji; it was "
                "replaced by U+FFFD."
            )
        if self.moved:
            notes.append(
                f"the chat template has no system turn; in {self.moved} conversations the system "
                "prompt was put at the beginning of the user's first turn."
            )
        return [f"{source}: {note}" for note in notes]

    def _missing(
        self, turns: list[Turn], tools: list[dict[str, Any]], text: str
    ) -> tuple[str, ...]:
        """Return what is not written: a name for each turn or tool of which a part is missing."""
        marked = _Marked(turns, tools)
        if marked.shape not in self._missing_of:
            with_marks = self.apply(marked.turns, marked.tools)
            if with_marks is None:  # it refuses marks only: the texts themselves are looked for
                return tuple(name for name, part in marked.texts if not _holds(text, part))
            if len(self._missing_of) > _SHAPES:
                self._missing_of.clear()
            self._missing_of[marked.shape] = tuple(
                name
                for index, (name, _) in enumerate(marked.texts)
                if MARK.format(index) not in with_marks
            )
        # Reasoning within the content does not depend on the shape.
        contents = ["".join(strings_in(turn.get("content"))) for turn in turns]
        thoughts = sum("</think>" in one and not _holds(text, one) for one in contents)
        arguments = [
            given
            for turn in turns
            for call in turn.get("tool_calls") or ()
            if isinstance(given := call["function"].get("arguments"), dict) and given
        ]
        as_python = sum(repr(one) in text for one in arguments if repr(one) != _json(one))
        return (
            *self._missing_of[marked.shape],
            *["reasoning"] * thoughts,
            *["arguments of calls as JSON"] * as_python,
        )


class _Marked:
    """A conversation with a mark in place of each text.

    Args:
        turns: of the conversation.
        tools: of the conversation.
    """

    def __init__(self, turns: list[Turn], tools: list[dict[str, Any]]) -> None:
        self.texts: list[tuple[str, str]] = []
        """What each mark stands for: a name of its kind, and the text."""
        self.turns = [{key: self._value(turn, key) for key in turn} for turn in turns]
        self.tools = [self._tool(tool) for tool in tools]

    @property
    def shape(self) -> str:
        """Equal for conversations that differ in their texts only."""
        return _json([self.turns, self.tools])

    def _value(self, turn: Turn, key: str) -> Any:
        value = turn[key]
        if key == "tool_calls":
            return [self._call(call) for call in value]
        if key == "content":
            name = f"turns of {turn['role']}"
            if isinstance(value, list):
                return [{**part, "text": self._mark(name, part["text"])} for part in value]
            return self._mark(name, value) if value else value
        if key.startswith("reasoning") or key == "thinking":
            return self._mark("reasoning", value)
        if key not in _NOT_TEXT and isinstance(value, str):
            return self._mark(f"`{key}` of turns", value)
        return value

    def _tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        function = tool.get("function")
        if not isinstance(function, dict) or "name" not in function:
            return tool
        return {**tool, "function": {**function, "name": self._mark("tools", function["name"])}}

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        name = self._mark("calls of tools", function.get("name", ""))
        kind = "arguments of calls"
        arguments: Any = function.get("arguments")
        if isinstance(arguments, dict):
            arguments = {key: self._mark(kind, _json(one)) for key, one in arguments.items()}
        elif isinstance(arguments, str) and arguments:
            mark = self._mark(kind, arguments)
            arguments = _json({mark: mark}) if arguments[:1] == "{" else mark
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def _mark(self, name: str, text: Any) -> str:
        self.texts.append((name, str(text)))
        return MARK.format(len(self.texts) - 1)


def _forms(turns: list[Turn]) -> Iterator[tuple[list[Turn], bool]]:
    """Yield the forms in which a template may take a conversation, the usual one first.

    Each with whether its system prompt is in a turn of the user.
    """
    yield turns, False
    if any(turn.get("tool_calls") for turn in turns):
        silent = [
            {k: v for k, v in turn.items() if k != "content" or v or not turn.get("tool_calls")}
            for turn in turns
        ]
        yield from ((form, False) for form in (silent, _as_text(turns), _as_text(silent)))
    first = next((n for n, turn in enumerate(turns) if turn["role"] == "user"), None)
    if turns[0]["role"] == "system" and first is not None and len(turns) > 1:
        merged = [dict(turn) for turn in turns[1:]]
        user = merged[first - 1]
        user["content"] = f"{turns[0]['content']}\n\n{user['content']}"
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

    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"].get("arguments")
        if isinstance(arguments, str):
            return call
        return {**call, "function": {**call["function"], "arguments": _json(arguments)}}

    return [
        {**turn, "tool_calls": [as_text(call) for call in turn["tool_calls"]]}
        if turn.get("tool_calls")
        else turn
        for turn in turns
    ]


def calls_as_text(turn: Any) -> str:
    """Return the calls of tools in a turn as lines of JSON, for text without a template."""
    calls = [call["function"] for call in turn.get("tool_calls") or ()]
    return "\n".join(
        _json({"name": call.get("name"), "arguments": call.get("arguments")}) for call in calls
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _holds(text: str, part: str) -> bool:
    """Return whether a text has a part, as it is or as JSON."""
    return part.strip() in text or _json(part.strip())[1:-1] in text
