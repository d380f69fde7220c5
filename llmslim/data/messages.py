"""Documents, and the messages of a conversation in the forms that data sets have.

Roles and contents may be named as ShareGPT does. Content may be a text, or a list of parts of which
the texts are joined. A turn may call tools without content: calls are brought into the form that
transformers documents for chat templates, `{"type": "function", "function": {"name": …,
"arguments": {…}}}`. Cells of tables that hold JSON as text are parsed.

Tables give every row the keys of all rows, empty where a row has none; keys without a value are
therefore left out, at any depth.
"""

from __future__ import annotations

import hashlib
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
    """The assistant's reasoning before its answer."""
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

EMPTY_TURNS = "empty turns"

_ROLES = {"human": "user", "gpt": "assistant"}
"""Names of roles that many data sets use, and those of chat templates."""
_CONTENT = ("content", "value")
_INSTEAD_OF_CONTENT = (
    "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking",
)  # fmt: skip


def characters(document: Document) -> int:
    """Return how long a document is."""
    if isinstance(document, str):
        return len(document)
    return sum(
        len(message["content"]) + sum(map(len, strings_in(_beside_content(message))))
        for message in document
    )


def identity(document: Document) -> int:
    """Return a number, 64 bits, that two documents share if they differ at most in white space."""
    if isinstance(document, str):
        text = " ".join(document.split())
    else:
        turns = [[m["role"], " ".join(m["content"].split()), _beside_content(m)] for m in document]
        text = json.dumps([turns, tools_of(document)], sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def tools_of(document: Document) -> list[dict[str, Any]]:
    """Return the tools of a conversation, none of a text or a plain list of messages."""
    return list(getattr(document, "tools", None) or [])


def messages_of(value: Any, column: str, where: str, counts: Counter[str]) -> list[Message]:
    """Return the messages that are not empty.

    Args:
        value: a list of messages, or JSON text of one.
        column: its column, for messages of errors.
        where: the row's place, for messages of errors.
        counts: what is left out is counted here: EMPTY_TURNS, and kinds of parts.

    Raises:
        DataError: if it is anything but messages.
    """
    value = _from_json(value)
    if not isinstance(value, list | None) or not all(isinstance(m, Mapping) for m in value or []):
        raise DataError(
            f"{where}: {column} holds a {type(value).__name__}; a list of messages with role and "
            "content is needed."
        )
    messages = [_message(given, column, where, counts) for given in value or []]
    found = [m for m in messages if m["content"] or any(m.get(k) for k in _INSTEAD_OF_CONTENT)]
    counts[EMPTY_TURNS] += len(messages) - len(found)
    return found


def tools_in(value: Any) -> list[dict[str, Any]] | None:
    """Return descriptions of tools, or None if a value holds anything else or nothing."""
    value = _from_json(value)
    listed = [_from_json(tool) for tool in value] if isinstance(value, list) else [value]
    if not listed or not all(isinstance(tool, Mapping) and tool for tool in listed):
        return None
    return [
        {"type": "function", "function": tool}
        if "function" not in tool and "name" in tool
        else tool
        for tool in map(_without_empty, listed)
    ]


def strings_in(value: Any) -> Iterator[str]:
    """Yield the texts in a value, at any depth, that are not blank; not the names of keys."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from strings_in(one)


def replace_surrogates(text: str) -> str:
    """Return a text with U+FFFD for every half of a surrogate pair, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def is_messages(value: Any) -> bool:
    """Return whether a value is a list of messages, or JSON text of one."""
    value = _from_json(value)
    return isinstance(value, list) and all(
        isinstance(one, Mapping) and ("role" in one or "from" in one) for one in value
    )


def text_of(value: Any, column: str, where: str) -> str | None:
    """Return a text, None if it is blank.

    Raises:
        DataError: if it is anything but text.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} holds a {type(value).__name__}; text is needed.")
    return value


def _beside_content(message: Message) -> dict[str, Any]:
    return {k: v for k, v in message.items() if k not in {"role", "content", "unfinished"}}


def _without_empty(value: Any) -> Any:
    """Return a value without the keys, at any depth, that have none."""
    if isinstance(value, Mapping):
        return {key: _without_empty(one) for key, one in value.items() if one is not None}
    return [_without_empty(one) for one in value] if isinstance(value, list) else value


def _message(given: Mapping[str, Any], column: str, where: str, counts: Counter[str]) -> Message:
    role = next((r for key in ("role", "from") if (r := given.get(key)) is not None), None)
    if not isinstance(role, str) or not any(k in given for k in (*_CONTENT, *_INSTEAD_OF_CONTENT)):
        raise DataError(
            f"{where}: a message in {column} has the keys {', '.join(map(str, given))}; "
            "role and content are needed."
        )
    content = next((c for key in _CONTENT if (c := given.get(key)) is not None), None)
    message = Message(role=_ROLES.get(role, role), content=_content(content, column, where, counts))
    others = _without_empty(
        {k: v for k, v in given.items() if k not in {"role", "from", *_CONTENT, "function_call"}}
    )
    if not isinstance(others.get("reasoning_content", ""), str):
        others.pop("reasoning_content")
        counts["reasoning_content"] += 1
    calls = _from_json(others.pop("tool_calls", None)) or _from_json(given.get("function_call"))
    calls = [calls] if isinstance(calls, Mapping) else calls
    if isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls):
        others["tool_calls"] = [_call(_without_empty(call)) for call in calls]
    elif calls:
        counts["tool_calls"] += 1
    return Message(**message, **{k: v for k, v in others.items() if v not in ([], "")})


def _content(value: Any, column: str, where: str, counts: Counter[str]) -> str:
    """Return a message's text, the texts of its parts joined; empty if it is blank."""
    if isinstance(value, list) and all(isinstance(part, str | Mapping) for part in value):
        texts = []
        for part in value:
            text = part if isinstance(part, str) else part.get("text")
            if isinstance(text, str):
                texts.append(text)
            else:
                counts[str(part.get("type") or "without a type")] += 1
        value = "".join(texts)
    return text_of(value, column, where) or ""


def _call(given: dict[str, Any]) -> dict[str, Any]:
    """Return a call of a tool in the form that chat templates expect."""
    call = given if isinstance(given.get("function"), Mapping) else {"function": given}
    function = dict(call["function"])
    arguments = _from_json(function.get("arguments", {}))
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _from_json(value: Any) -> Any:
    """Return the list or object that a text is the JSON of, else the value."""
    if not isinstance(value, str) or value.lstrip()[:1] not in {"[", "{"}:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
