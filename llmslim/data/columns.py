"""Make a document of a row of a table, by the names of its columns.

The layouts are those that data sets on the hub have: a text; a conversation; a question and its
answer. A row is read by the first one in the list below that it fills, so that a file joined of
several data sets is read row by row. Where the names are others, a field map names the column of
each.

Some data sets have more columns with a conversation or a question: a system prompt, the tools that
may be called, what the question is about (`context`, as in Dolly, or `input`, as in Alpaca: put
below the question, as in those data sets' own prompts), and the assistant's reasoning. Columns
that hold text and are not read are counted, and so are rows without any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llmslim.errors import DataError

from .messages import (
    EMPTY_TURNS,
    Conversation,
    Document,
    Message,
    is_messages,
    messages_of,
    replace_surrogates,
    strings_in,
    text_of,
    tools_in,
    tools_of,
)

LICENCE = "license"
"""The name of the column, where there is one."""

_LAYOUTS: tuple[dict[str, str], ...] = (
    {"text": "text"},
    {"text": "content"},
    {"messages": "messages"},
    {"messages": "conversations"},
    {"prompt": "instruction", "answer": "response"},
    {"prompt": "instruction", "answer": "output"},
    {"prompt": "prompt", "answer": "completion"},
    {"prompt": "prompt", "answer": "response"},
    {"prompt": "question", "answer": "answer"},
    {"prompt": "question", "answer": "response"},
)
"""The column of each part of a document."""
_EXTRAS = {
    "system": ("system", "system_prompt"),
    "tools": ("tools",),
    "context": ("context", "input"),
    "reasoning": ("reasoning_content",),
}
"""Columns that are added to a layout: the first two to messages, all to a question."""
_MESSAGE_EXTRAS = ("system", "tools")
_FIELD_MAPS = {
    frozenset({"text"}): (),
    frozenset({"messages"}): _MESSAGE_EXTRAS,
    frozenset({"prompt", "answer"}): tuple(_EXTRAS),
}
"""What a field map must name, and what it may name as well."""


def check_fields(fields: Mapping[str, str], where: str) -> None:
    """Refuse a field map that names anything but a text, messages, or prompt and answer.

    Raises:
        DataError: if it does.
    """
    if not any(need <= set(fields) <= need | set(may) for need, may in _FIELD_MAPS.items()):
        allowed = "; ".join(
            ", ".join(sorted(need, reverse=True))
            + (f" (and perhaps {', '.join(may)})" if may else "")
            for need, may in _FIELD_MAPS.items()
        )
        raise DataError(
            f"{where}: fields has {', '.join(fields) or 'nothing'}; allowed are {allowed}. "
            "Each names a column of the data."
        )


def check_left_out(source: str, left_out: int, rows: int, notes: Sequence[str]) -> None:
    """Refuse data of which more than half is left out: it is not what the user meant.

    Args:
        source: its name.
        left_out: how many rows were left out.
        rows: how many there were.
        notes: why they were left out.

    Raises:
        DataError: if more than half of the rows were left out.
    """
    if 2 * left_out > rows:
        raise DataError(
            f"{source}: {left_out} of {rows} rows were left out; at least half must be usable. "
            f"{' '.join(notes)} Correct the data, or name its columns (fields)."
        )


class RowReader:
    """Makes documents of rows, and counts what it leaves out.

    Args:
        fields: the column of the text, the messages, the prompt or the answer, if the names are
            not those of a known layout.
    """

    def __init__(self, fields: Mapping[str, str] | None = None) -> None:
        self._fields = fields
        self.clear()

    def clear(self) -> None:
        """Count from zero, as for another pass over the rows."""
        self.rows = 0
        self._left_out: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()
        self._surrogates, self._first_surrogate = 0, ""

    @property
    def left_out(self) -> int:
        """How many rows hold no document."""
        return self._left_out.total()

    def __call__(self, row: Mapping[str, Any], where: str) -> Document | None:
        """Return the document in a row, None if it holds none.

        Args:
            row: values by column.
            where: the row's place, for messages.

        Raises:
            DataError: if the columns are not there, or hold anything but text.
        """
        given, row = row, _clean(row)
        layouts = self._layouts(list(row), where)
        self.rows += 1
        for layout in layouts:
            if not all(_filled(row[layout[name]]) for name in layout if name not in _EXTRAS):
                continue
            document, used = self._read(row, layout, where)
            if document:
                self._count_unread(row, used, document)
                # JSON in a row's texts may have more surrogates.
                parts = [document, tools_of(document)]
                text, tools = _clean(parts)
                if row != given or [text, tools] != parts:
                    # Without the folder, since notes are published.
                    self._first_surrogate = self._first_surrogate or where.rpartition("/")[2]
                    self._surrogates += 1
                return text if isinstance(text, str) else Conversation(text, tools)
        partly = any(
            _filled(row[layout[name]])
            for layout in layouts
            for name in ("prompt", "answer")
            if name in layout
        )
        self._left_out[_HALF if partly else _EMPTY] += 1
        return None

    def notes(self, source: str) -> list[str]:
        """Return sentences about what was left out since the last `clear`."""
        notes = [f"{count} {sentence}" for sentence, count in self._left_out.items()]
        parts = self._counts.copy()
        if turns := parts.pop(EMPTY_TURNS, 0):
            notes.append(f"{turns} turns of conversations are empty and were left out.")
        if parts:
            notes.append(
                f"{parts.total()} parts of messages are no text and were left out "
                f"({counted(parts)})."
            )
        if self._surrogates:
            notes.append(
                f"{self._surrogates} rows, the first at {self._first_surrogate}, hold half of a "
                "surrogate pair, as of a cut emoji; each was replaced by U+FFFD."
            )
        if self._unread:
            notes.append(f"not read, though they hold text: the columns {counted(self._unread)}.")
        return [f"{source}: {note}" for note in notes]

    def _layouts(self, columns: Sequence[str], where: str) -> list[Mapping[str, str]]:
        """Return the layouts that the columns allow, at least one.

        Raises:
            DataError: if there is none.
        """
        shown = ", ".join(map(str, columns)) or "(none)"
        if self._fields is not None:
            missing = [column for column in self._fields.values() if column not in columns]
            if missing:
                raise DataError(
                    f"{where}: fields names {', '.join(missing)}; the columns are {shown}. "
                    "Name one of those."
                )
            return [self._fields]
        there = set(columns)
        found: list[Mapping[str, str]] = [
            {**layout, **_extra_columns(layout, there)}
            for layout in _LAYOUTS
            if there.issuperset(layout.values())
        ]
        if not found:
            known = ", ".join("+".join(layout.values()) for layout in _LAYOUTS)
            raise DataError(
                f"{where}: has the columns {shown}; one of {known} is needed. Rename the columns, "
                "or map them (fields)."
            )
        return found

    def _read(
        self, row: Mapping[str, Any], layout: Mapping[str, str], where: str
    ) -> tuple[Document | None, set[str]]:
        """Return the document that a row holds by a layout, and the columns it was made of."""
        if "text" in layout:
            return text_of(row[layout["text"]], layout["text"], where), {layout["text"]}
        used = {column for name, column in layout.items() if name not in _EXTRAS}
        if "messages" in layout:
            turns = Conversation(
                messages_of(row[layout["messages"]], layout["messages"], where, self._counts)
            )
        else:
            sides = [
                self._turns(row[layout[name]], role, layout[name], where)
                for name, role in (("prompt", "user"), ("answer", "assistant"))
            ]
            turns = Conversation([*sides[0], *sides[1]] if all(sides) else [])
        if not turns:
            return None, used
        prompt = row[layout.get("prompt", next(iter(layout.values())))]
        used |= {
            column
            for name, column in layout.items()
            if name in _EXTRAS and _add(turns, name, row[column], prompt)
        }
        return turns, used

    def _turns(self, value: Any, role: str, column: str, where: str) -> list[Message]:
        """Return one side of an exchange: a text in that role, or messages already."""
        if isinstance(value, list) or is_messages(value):
            return messages_of(value, column, where, self._counts)
        text = text_of(value, column, where)
        return [] if text is None else [Message(role=role, content=text)]

    def _count_unread(self, row: Mapping[str, Any], used: set[str], document: Document) -> None:
        texts = [document] if isinstance(document, str) else list(strings_in(document))
        for column, value in row.items():
            if column in used or column == LICENCE:
                continue
            # A column that repeats a part of the document, such as its prompt, is not lost.
            if any(not any(one.strip() in text for text in texts) for one in strings_in(value)):
                self._unread[str(column)] += 1


def counted(counts: Mapping[str, int]) -> str:
    """Return what was counted as text: `tools (3), reasoning (1)`."""
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def _extra_columns(layout: Mapping[str, str], there: set[str]) -> dict[str, str]:
    names = () if "text" in layout else _MESSAGE_EXTRAS if "messages" in layout else _EXTRAS
    return {
        name: column
        for name in names
        if (column := next((c for c in _EXTRAS[name] if c in there), None)) is not None
    }


def _filled(value: Any) -> bool:
    return not (value is None or value == [] or (isinstance(value, str) and not value.strip()))


def _add(turns: Conversation, name: str, value: Any, prompt: Any) -> bool:
    """Add an extra column to a conversation; return whether it is now part of it."""
    if name == "tools":
        turns.tools = tools_in(value) or []
        return bool(turns.tools)
    if not isinstance(value, str) or not value.strip():
        return False
    if name == "system" and not any(turn["role"] == "system" for turn in turns):
        turns.insert(0, Message(role="system", content=value))
        return True
    questions = [turn for turn in turns if turn["role"] == "user"]
    if name == "context" and isinstance(prompt, str) and questions:
        questions[-1]["content"] += f"\n\n{value}"
        return True
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if name == "reasoning" and answers and "reasoning_content" not in answers[-1]:
        answers[-1]["reasoning_content"] = value
        return True
    return False


def _clean(value: Any) -> Any:
    """Return a value without lone surrogates in its texts and keys, at any depth."""
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, Mapping):
        return {_clean(key): _clean(one) for key, one in value.items()}
    return [_clean(one) for one in value] if isinstance(value, list) else value


_EMPTY = "rows hold no text in the columns that are read, and were left out."
_HALF = "rows hold a question without an answer or an answer without a question, and were left out."
