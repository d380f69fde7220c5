"""Read the messages of a conversation in the forms that data sets have, and count what is not read.

Roles and contents may be named as ShareGPT does. Content may be a text, or a list of parts of which
the texts are joined. A turn may call tools and say nothing: calls are brought into the form that
transformers documents for chat templates, `{"type": "function", "function": {"name": …,
"arguments": {…}}}`. Cells of tables that hold JSON as text are read as what they stand for.

Tables give every row the keys of all rows, empty where a row has none; keys without a value are
therefore left out, at any depth.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NotRequired, TypedDict

from llmslim.errors import DataError


class Message(TypedDict):
    """One turn of a conversation; other keys of the data are kept for the chat template."""

    role: str
    content: str
    reasoning_content: NotRequired[str]
    """What the assistant thinks before it answers."""
    tool_calls: NotRequired[list[dict[str, Any]]]
    """Functions that the assistant calls."""
    unfinished: NotRequired[bool]
    """The turn was cut off: nothing follows, not even the end of the turn."""


class Conversation(list[Message]):
    """Messages, and the tools that the assistant may call.

    Args:
        messages: in order.
        tools: descriptions of functions, as `apply_chat_template` takes them.
    """

    def __init__(
        self, messages: list[Message] | None = None, tools: list[dict[str, Any]] | None = None
    ) -> None:
        super().__init__(messages or [])
        self.tools = tools or []


Document = str | list[Message]

_ROLES = {"human": "user", "gpt": "assistant"}
"""Names of roles that many data sets use, and what chat templates call them."""
_SAID = ("content", "value")
_ALSO_SAID = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def tools_of(document: Document) -> list[dict[str, Any]]:
    """Return the tools of a conversation, none of a text or a plain list of messages."""
    return list(getattr(document, "tools", None) or [])


def messages_of(value: Any, column: str, where: str, counts: Counter[str]) -> list[Message]:
    """Return the messages that say something.

    Args:
        value: a list of messages, or JSON text of one.
        column: where it stands, for messages of errors.
        where: the row's place, for messages of errors.
        counts: what was left out is counted here.

    Raises:
        DataError: if it is anything but messages.
    """
    value = _from_json(value)
    if not isinstance(value, list | None) or not all(isinstance(m, Mapping) for m in value or []):
        raise DataError(
            f"{where}: {column} holds a {type(value).__name__}; a list of messages with role and "
            "content is needed."
        )
    found = []
    for given in value or []:
        message = _message(given, column, where, counts)
        if message["content"] or any(message.get(key) for key in _ALSO_SAID):
            found.append(message)
        else:
            counts["turns"] += 1
    return found


def tools_in(value: Any) -> list[dict[str, Any]] | None:
    """Return descriptions of tools, or None if a value holds something else or nothing."""
    value = _from_json(value)
    listed = [_from_json(tool) for tool in value] if isinstance(value, list) else [value]
    if not listed or not all(isinstance(tool, Mapping) and tool for tool in listed):
        return None
    tools = [without_empty(tool) for tool in listed]
    return [
        {"type": "function", "function": tool}
        if "function" not in tool and "name" in tool
        else tool
        for tool in tools
    ]


def without_empty(value: Any) -> Any:
    """Return a value without the keys, at any depth, that have none."""
    if isinstance(value, Mapping):
        return {key: without_empty(one) for key, one in value.items() if one is not None}
    return [without_empty(one) for one in value] if isinstance(value, list) else value


def strings_in(value: Any) -> Iterator[str]:
    """Yield the texts in a value, at any depth, that are not blank; not the names of keys."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from strings_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from strings_in(one)


def mended(text: str) -> str:
    """Return a text with U+FFFD for every half of a surrogate pair, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def is_messages(value: Any) -> bool:
    """Tell whether a value is a list of messages, or JSON text of one."""
    value = _from_json(value)
    return isinstance(value, list) and all(
        isinstance(one, Mapping) and ("role" in one or "from" in one) for one in value
    )


def _message(given: Mapping[str, Any], column: str, where: str, counts: Counter[str]) -> Message:
    """Return one message.

    Raises:
        DataError: if it has no role, or nothing that it could say.
    """
    role = next((r for key in ("role", "from") if (r := given.get(key)) is not None), None)
    if not isinstance(role, str) or not any(key in given for key in (*_SAID, *_ALSO_SAID)):
        raise DataError(
            f"{where}: a message in {column} has the keys {', '.join(map(str, given))}; "
            "role and content are needed."
        )
    said = next((s for key in _SAID if (s := given.get(key)) is not None), None)
    message = Message(role=_ROLES.get(role, role), content=_content(said, column, where, counts))
    others = without_empty(
        {k: v for k, v in given.items() if k not in {"role", "from", *_SAID, "function_call"}}
    )
    if not isinstance(others.get("reasoning_content", ""), str):
        others.pop("reasoning_content")
        counts["parts reasoning_content"] += 1
    calls = _from_json(others.pop("tool_calls", None)) or _from_json(given.get("function_call"))
    calls = [calls] if isinstance(calls, Mapping) else calls
    if isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls):
        others["tool_calls"] = [_call(without_empty(call)) for call in calls]
    elif calls:
        counts["parts tool_calls"] += 1
    return Message(**message, **{k: v for k, v in others.items() if v not in ([], "")})


def _content(value: Any, column: str, where: str, counts: Counter[str]) -> str:
    """Return a message's text, the texts of its parts joined; empty if it is blank.

    Raises:
        DataError: if it is anything but a text or parts.
    """
    if isinstance(value, list) and all(isinstance(part, str | Mapping) for part in value):
        texts = []
        for part in value:
            text = part if isinstance(part, str) else part.get("text")
            if isinstance(text, str):
                texts.append(text)
            elif not isinstance(part, str):
                counts[f"parts {part.get('type') or 'without a type'}"] += 1
        value = "".join(texts)
    return text_of(value, column, where) or ""


def text_of(value: Any, column: str, where: str) -> str | None:
    """Return a text, None if there is nothing in it.

    Raises:
        DataError: if it is anything but text.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} holds a {type(value).__name__}; text is needed.")
    return value


def _call(given: dict[str, Any]) -> dict[str, Any]:
    """Return a call of a tool in the form that chat templates expect."""
    call = given if isinstance(given.get("function"), Mapping) else {"function": given}
    function = dict(call["function"])
    arguments = _from_json(function.get("arguments", {}))
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _from_json(value: Any) -> Any:
    """Return what a text stands for if it is JSON of a list or an object, else the value."""
    if not isinstance(value, str) or value.lstrip()[:1] not in {"[", "{"}:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
