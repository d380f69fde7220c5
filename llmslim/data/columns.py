"""Know what a row of a table holds by the names of its columns.

The layouts are those that data sets on the hub have: a text; a conversation; a question and its
answer. The first one in the list below whose columns are all there counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from llmslim.errors import DataError


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Document = str | list[Message]

_LAYOUTS = (
    ("text",),
    ("content",),
    ("messages",),
    ("conversations",),
    ("instruction", "response"),
    ("prompt", "completion"),
)
_ROLES = {"human": "user", "gpt": "assistant"}
"""Names of roles that many data sets use, and what chat templates call them."""


def layout_of(columns: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the columns to read, of the first known layout that is there.

    Raises:
        DataError: if none is.
    """
    for layout in _LAYOUTS:
        if set(layout) <= set(columns):
            return layout
    known = ", ".join("+".join(layout) for layout in _LAYOUTS)
    raise DataError(
        f"{where}: has the columns {', '.join(map(str, columns)) or '(none)'}; "
        f"one of {known} is needed. Rename the columns."
    )


def document_of(row: Mapping[str, Any], where: str) -> Document | None:
    """Return what a row holds, None if that is nothing.

    Raises:
        DataError: if its columns are of no known layout, or hold something else than text.
    """
    layout = layout_of(list(row), where)
    if layout in {("text",), ("content",)}:
        return _text(row[layout[0]], layout[0], where)
    if len(layout) == 1:
        return _messages(row[layout[0]], layout[0], where) or None
    sides = zip(layout, ("user", "assistant"), strict=True)
    turns = [_turns(row[column], role, column, where) for column, role in sides]
    return list(itertools.chain(*turns)) if all(turns) else None


def _turns(value: Any, role: str, column: str, where: str) -> list[Message]:
    """Return one side of an exchange: a text said in that role, or messages already."""
    if isinstance(value, list):
        return _messages(value, column, where)
    text = _text(value, column, where)
    return [] if text is None else [Message(role=role, content=text)]


def _text(value: Any, column: str, where: str) -> str | None:
    """Return a text, None if there is nothing in it.

    Raises:
        DataError: if it is anything but text.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} holds a {type(value).__name__}; text is needed.")
    return value


def _messages(value: Any, column: str, where: str) -> list[Message]:
    """Return the messages that say something; roles and contents may be named as ShareGPT does.

    Raises:
        DataError: if it is anything but messages.
    """
    if not isinstance(value, list | None) or not all(isinstance(m, Mapping) for m in value or []):
        raise DataError(
            f"{where}: {column} holds a {type(value).__name__}; a list of messages with role and "
            "content is needed."
        )
    messages = []
    for message in value or []:
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or not ("content" in message or "value" in message):
            raise DataError(
                f"{where}: a message in {column} has the keys {', '.join(map(str, message))}; "
                "role and content are needed."
            )
        text = _text(message.get("content", message.get("value")), column, where)
        if text is not None:
            messages.append(Message(role=_ROLES.get(role, role), content=text))
    return messages
