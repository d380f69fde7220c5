"""Make a document of a row of a table, by the names of its columns.

The layouts are those that data sets on the hub have: a text; a conversation; a question and its
answer. A row is read by the first one in the list below that it fills, so that a file joined of
several data sets is read row by row. Where the names are others, a field map says which column is
what.

Beside a conversation or a question stand, in some data sets, a system prompt, the tools that may be
called, what the question is about (`context`, as in Dolly, or `input`, as in Alpaca: put below the
question, as in those data sets' own prompts), and what the assistant thinks. Columns that hold text
and are not read are counted, and so are rows without any.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llmslim.errors import DataError

from .messages import (
    Conversation,
    Document,
    Message,
    is_messages,
    mended,
    messages_of,
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
"""What each column of a layout is."""
_BESIDE = {
    "system": ("system", "system_prompt"),
    "tools": ("tools",),
    "context": ("context", "input"),
    "reasoning": ("reasoning_content",),
}
"""Columns that count beside a layout: the first two beside messages, all beside a question."""
_BESIDE_MESSAGES = ("system", "tools")
_MAPPED = {
    frozenset({"text"}): (),
    frozenset({"messages"}): _BESIDE_MESSAGES,
    frozenset({"prompt", "answer"}): tuple(_BESIDE),
}
"""What a field map must name, and what it may name beside it."""


def characters(document: Document) -> int:
    """Return how long a document is."""
    if isinstance(document, str):
        return len(document)
    said = sum(len(message["content"]) for message in document)
    return said + sum(len(one) for m in document for one in strings_in(_beside_content(m)))


def identity(document: Document) -> int:
    """Return a number, 64 bits, that two documents share if they say the same but for spaces."""
    if isinstance(document, str):
        said = " ".join(document.split())
    else:
        turns = [[m["role"], " ".join(m["content"].split()), _beside_content(m)] for m in document]
        said = json.dumps([turns, tools_of(document)], sort_keys=True, default=str)
    digest = hashlib.blake2b(said.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _beside_content(message: Message) -> dict[str, Any]:
    return {k: v for k, v in message.items() if k not in {"role", "content", "unfinished"}}


def check_fields(fields: Mapping[str, str], where: str) -> None:
    """Refuse a field map that names something else than a text, messages, or prompt and answer.

    Raises:
        DataError: if it does.
    """
    if not any(need <= set(fields) <= need | set(may) for need, may in _MAPPED.items()):
        allowed = "; ".join(
            ", ".join(sorted(need, reverse=True))
            + (f" (and perhaps {', '.join(may)})" if may else "")
            for need, may in _MAPPED.items()
        )
        raise DataError(
            f"{where}: fields has {', '.join(fields) or 'nothing'}; allowed are {allowed}. "
            "Each names a column of the data."
        )


def check_left(source: str, left_out: int, rows: int, notes: Sequence[str]) -> None:
    """Refuse data of which less than half is left: it is not what was meant.

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
            f"{source}: {left_out} of {rows} rows were left out; at least half must be of use. "
            f"{' '.join(notes)} Mend the data, or name its columns (fields)."
        )


class RowReader:
    """Makes documents of rows, and keeps account of what it leaves out.

    Args:
        fields: which column is the text, the messages, the prompt or the answer, if the names are
            not those of a known layout.
    """

    def __init__(self, fields: Mapping[str, str] | None = None) -> None:
        self._fields = fields
        self.clear()

    def clear(self) -> None:
        """Begin to count from zero, as for another pass over the rows."""
        self.rows = 0
        self._left_out: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()
        self._halved, self._first_halved = 0, ""

    @property
    def left_out(self) -> int:
        """How many rows hold no document."""
        return self._left_out.total()

    def pick(self, columns: Sequence[str], where: str) -> list[str]:
        """Return the columns of a table to read, which are all.

        Raises:
            DataError: if those that are needed are not there.
        """
        self._layouts(columns, where)
        return list(columns)

    def __call__(self, row: Mapping[str, Any], where: str) -> Document | None:
        """Return what a row holds, None if that is nothing.

        Args:
            row: values by column.
            where: the row's place, for messages.

        Raises:
            DataError: if the columns are not there, or hold something else than text.
        """
        whole = _mend(row)
        row = row if whole is None else whole
        layouts = self._layouts(list(row), where)
        self.rows += 1
        for layout in layouts:
            if not all(_filled(row[layout[name]]) for name in layout if name not in _BESIDE):
                continue
            document, used = self._read(row, layout, where)
            if document:
                self._note_unread(row, used, document)
                return self._mended(document, where, halved=whole is not None)
        sides = [
            row[layout[name]]
            for layout in layouts
            for name in ("prompt", "answer")
            if name in layout
        ]
        self._left_out["sides" if any(map(_filled, sides)) else "empty"] += 1
        return None

    def notes(self, source: str) -> list[str]:
        """Return sentences about what was left out since the last `clear`."""
        notes = [f"{source}: {count} {_SENTENCES[what]}" for what, count in self._left_out.items()]
        if turns := self._counts["turns"]:
            notes.append(f"{source}: {turns} turns of conversations are empty and were left out.")
        parts = {
            what.removeprefix("parts "): count
            for what, count in self._counts.items()
            if what.startswith("parts ")
        }
        if parts:
            notes.append(
                f"{source}: {sum(parts.values())} parts of messages are no text and were left out "
                f"({_listed(parts)})."
            )
        if self._halved:
            notes.append(
                f"{source}: {self._halved} rows, the first at {self._first_halved}, hold half of a "
                "surrogate pair, as of a cut emoji; each was replaced by U+FFFD."
            )
        if self._unread:
            notes.append(
                f"{source}: not read, though they hold text: the columns {_listed(self._unread)}."
            )
        return notes

    def _layouts(self, columns: Sequence[str], where: str) -> list[Mapping[str, str]]:
        """Return the layouts that the columns allow, at least one.

        Raises:
            DataError: if there is none.
        """
        if self._fields is not None:
            missing = [column for column in self._fields.values() if column not in columns]
            if missing:
                raise DataError(
                    f"{where}: fields names {', '.join(missing)}; the columns are "
                    f"{', '.join(map(str, columns)) or '(none)'}. Name one of those."
                )
            return [self._fields]
        there = set(columns)
        found: list[Mapping[str, str]] = [
            {**layout, **_beside(layout, there)}
            for layout in _LAYOUTS
            if there.issuperset(layout.values())
        ]
        if not found:
            known = ", ".join("+".join(layout.values()) for layout in _LAYOUTS)
            raise DataError(
                f"{where}: has the columns {', '.join(map(str, columns)) or '(none)'}; "
                f"one of {known} is needed. Rename the columns, or say which is what (fields)."
            )
        return found

    def _read(
        self, row: Mapping[str, Any], layout: Mapping[str, str], where: str
    ) -> tuple[Document | None, set[str]]:
        """Return what a row holds by a layout, and the columns that went into it."""
        if "text" in layout:
            return text_of(row[layout["text"]], layout["text"], where), {layout["text"]}
        used = {column for name, column in layout.items() if name not in _BESIDE}
        if "messages" in layout:
            found = messages_of(row[layout["messages"]], layout["messages"], where, self._counts)
            turns = Conversation(found)
        else:
            sides = [
                self._turns(row[layout[name]], role, layout[name], where)
                for name, role in (("prompt", "user"), ("answer", "assistant"))
            ]
            if not all(sides):
                return None, used
            turns = Conversation([*sides[0], *sides[1]])
        if not turns:
            return None, used
        for name, column in layout.items():
            if name in _BESIDE and _put(
                turns, name, row[column], row[layout.get("prompt", column)]
            ):
                used.add(column)
        return turns, used

    def _turns(self, value: Any, role: str, column: str, where: str) -> list[Message]:
        """Return one side of an exchange: a text said in that role, or messages already."""
        if isinstance(value, list) or is_messages(value):
            return messages_of(value, column, where, self._counts)
        text = text_of(value, column, where)
        return [] if text is None else [Message(role=role, content=text)]

    def _note_unread(self, row: Mapping[str, Any], used: set[str], document: Document) -> None:
        said = [document] if isinstance(document, str) else list(strings_in(document))
        for column, value in row.items():
            if column in used or column == LICENCE:
                continue
            # What the document says anyway, as the prompt that also begins it, is not lost.
            if any(not any(one.strip() in text for text in said) for one in strings_in(value)):
                self._unread[str(column)] += 1

    def _mended(self, document: Document, where: str, *, halved: bool) -> Document:
        """Return a document that every tokenizer can read: JSON in a row's texts may have more.

        Args:
            document: of a row.
            where: the row's place.
            halved: whether half a surrogate pair was in the row itself.
        """
        whole = _mend([document, tools_of(document)])
        if whole is None and not halved:
            return document
        if not self._halved:  # the folder is nobody's business: notes are published
            self._first_halved = where.rpartition("/")[2]
        self._halved += 1
        if whole is None:
            return document
        return whole[0] if isinstance(document, str) else Conversation(*whole)


def _beside(layout: Mapping[str, str], there: set[str]) -> dict[str, str]:
    """Return the columns that count beside a layout's own."""
    names = () if "text" in layout else _BESIDE_MESSAGES if "messages" in layout else _BESIDE
    return {
        name: column
        for name in names
        if (column := next((c for c in _BESIDE[name] if c in there), None)) is not None
    }


def _filled(value: Any) -> bool:
    return not (value is None or value == [] or (isinstance(value, str) and not value.strip()))


def _put(turns: Conversation, name: str, value: Any, prompt: Any) -> bool:
    """Put what stands beside a conversation into it; tell whether it is there then."""
    if name == "tools":
        turns.tools = tools_in(value) or []
        return bool(turns.tools)
    if not isinstance(value, str) or not value.strip():
        return False
    if name == "system" and not any(turn["role"] == "system" for turn in turns):
        turns.insert(0, Message(role="system", content=value))
        return True
    asked = [turn for turn in turns if turn["role"] == "user"]
    if name == "context" and isinstance(prompt, str) and asked:
        asked[-1]["content"] += f"\n\n{value}"
        return True
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if name == "reasoning" and answers and "reasoning_content" not in answers[-1]:
        answers[-1]["reasoning_content"] = value
        return True
    return False


def _mend(value: Any) -> Any:
    """Return a value with mended texts and keys; None if nothing is to be mended."""
    if isinstance(value, str):
        return None if (whole := mended(value)) is value else whole
    if isinstance(value, Mapping):
        keys = {key: new for key in value if (new := _mend(key)) is not None}
        parts = {key: new for key, one in value.items() if (new := _mend(one)) is not None}
        return (
            {keys.get(k, k): parts.get(k, v) for k, v in value.items()} if keys or parts else None
        )
    if not isinstance(value, list):
        return None
    items = {index: new for index, one in enumerate(value) if (new := _mend(one)) is not None}
    return [items.get(index, one) for index, one in enumerate(value)] if items else None


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


_SENTENCES = {
    "empty": "rows hold no text in the columns that are read, and were left out.",
    "sides": "rows hold a question without an answer or an answer without a question, and were "
    "left out.",
}
