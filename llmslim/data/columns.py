"""Know what a row of a table holds by the names of its columns.

The layouts are those that data sets on the hub have: a text; a conversation; a question and its
answer. The first one in the list below whose columns are all there counts. Where the names are
others, a field map says which column is what.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from llmslim.errors import DataError


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str
    unfinished: NotRequired[bool]
    """The turn was cut off: nothing follows, not even the end of the turn."""


Document = str | list[Message]

_LAYOUTS = (
    ("text",),
    ("content",),
    ("messages",),
    ("conversations",),
    ("instruction", "response"),
    ("prompt", "completion"),
)
_FIELDS = {
    frozenset({"text"}): ("text",),
    frozenset({"messages"}): ("messages",),
    frozenset({"prompt", "answer"}): ("prompt", "answer"),
    frozenset({"system", "prompt", "answer"}): ("system", "prompt", "answer"),
}
"""What a field map may name, in the order of the conversation."""
_ROLES = {"human": "user", "gpt": "assistant"}
"""Names of roles that many data sets use, and what chat templates call them."""


def characters(document: Document) -> int:
    """Return how long a document is."""
    if isinstance(document, str):
        return len(document)
    return sum(len(message["content"]) for message in document)


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


def columns_of(
    columns: Sequence[str], where: str, fields: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Return the columns to read: those that a field map names, else those of the known layout.

    Raises:
        DataError: if one of them is not there, or no layout fits.
    """
    if fields is None:
        return layout_of(columns, where)
    missing = [column for column in fields.values() if column not in columns]
    if missing:
        raise DataError(
            f"{where}: fields names {', '.join(missing)}; the columns are "
            f"{', '.join(map(str, columns)) or '(none)'}. Name one of those."
        )
    return tuple(fields.values())


def check_fields(fields: Mapping[str, str], where: str) -> None:
    """Refuse a field map that names something else than a text, messages, or prompt and answer.

    Raises:
        DataError: if it does.
    """
    if frozenset(fields) not in _FIELDS:
        allowed = "; ".join(", ".join(names) for names in _FIELDS.values())
        raise DataError(
            f"{where}: fields has {', '.join(fields) or 'nothing'}; allowed are {allowed}. "
            "Each names a column of the data."
        )


def document_of(
    row: Mapping[str, Any], where: str, fields: Mapping[str, str] | None = None
) -> Document | None:
    """Return what a row holds, None if that is nothing.

    Args:
        row: values by column.
        where: the row's place, for messages.
        fields: which column is the text, the messages, the prompt or the answer, if the names
            are not those of a known layout.

    Raises:
        DataError: if the columns are not there, or hold something else than text.
    """
    layout = columns_of(list(row), where, fields)
    names = _FIELDS[frozenset(fields)] if fields else layout
    if fields:
        layout = tuple(fields[name] for name in names)
    if len(layout) == 1:
        read = _text if names[0] in {"text", "content"} else _messages
        return read(row[layout[0]], layout[0], where) or None
    roles = ("system", "user", "assistant")[-len(layout) :]
    turns = [
        _turns(row[column], role, column, where) for column, role in zip(layout, roles, strict=True)
    ]
    # A system prompt may be empty, the two sides of an exchange may not.
    return list(itertools.chain(*turns)) if all(turns[-2:]) else None


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
