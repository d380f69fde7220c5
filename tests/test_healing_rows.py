"""No row and no column is lost without a word: rows and notes of every kind of file."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers_data import alone as alone
from helpers_data import jsonl, put, spec, table
from helpers_healing_data import heal, hub, problem
from helpers_templates import TEMPLATES, tokenizer_of
from tiny import tiny_model

from llmslim.data import HealingText, calibration_windows, read_texts, sources
from llmslim.data.columns import RowReader
from llmslim.errors import DataError
from llmslim.healing.measure import answers
from llmslim.recipe.schema import HealSource

LOAD = datasets.load_dataset
KINDS = ["jsonl", "jsonl.gz", "json", "json.gz", "parquet", "csv", "hub"]
QWEN = tokenizer_of(TEMPLATES["qwen2.5"])
ASK, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def written(kind: str, path: Path, rows: list[dict[str, Any]], patch: Any) -> str:
    """Write rows in a kind of file; a table of text holds JSON where a value is no text."""
    if kind == "hub":
        patch.setattr(datasets, "load_dataset", LOAD)  # perhaps there is a stand-in already
        hub(patch, table("parquet", path / f"hub{len(rows)}.parquet", rows))
        return f"org/name{len(rows)}"
    name = path / f"a.{kind}"
    if kind.startswith("json") and "jsonl" not in kind:
        return put(name, json.dumps(rows, indent=1).encode())
    if kind != "csv":
        return table(kind.removesuffix(".gz"), name, rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    out = csv.DictWriter(text, columns)
    out.writeheader()
    for row in rows:
        values = {c: row.get(c) for c in columns}
        out.writerow(
            {
                c: v if isinstance(v, str) else "" if v is None else json.dumps(v)
                for c, v in values.items()
            }
        )
    return put(name, text.getvalue().encode())


def texts(text: HealingText, tokenizer: Any = QWEN) -> list[str]:
    """Return every sample as text."""
    found = []
    for row in text.train:
        starts = [i for i, p in enumerate(row["position_ids"].tolist()) if p == 0]
        for begin, end in zip(starts, [*starts[1:], len(row["labels"])], strict=True):
            if (row["labels"][begin:end] != -100).any():
                found.append(tokenizer.decode(row["input_ids"][begin:end]))
    return sorted(found)


def read(name: Any, tokenizer: Any = QWEN, **options: Any) -> tuple[list[str], list[str]]:
    text = heal(name, tokenizer=tokenizer, length=512, held_out=0, **options)
    return texts(text, tokenizer), list(text.notes)


def chat(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city"}}
QUESTION = [("system", "You are kind."), ("user", "Q"), ("assistant", "A")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("row", "turns"),
    [
        (
            {"instruction": "Q", "context": "C", "response": "A"},
            [("system", "You are kind."), ("user", "Q\n\nC"), ("assistant", "A")],
        ),
        (
            {"instruction": "Q", "input": "I", "response": "A"},
            [("system", "You are kind."), ("user", "Q\n\nI"), ("assistant", "A")],
        ),
        (
            {"instruction": "Q", "input": "", "output": "A"},
            [("system", "You are kind."), ("user", "Q"), ("assistant", "A")],
        ),
        (
            {"system": "S", "prompt": "Q", "completion": "A"},
            [("system", "S"), ("user", "Q"), ("assistant", "A")],
        ),
        ({"prompt": "Q", "response": "A"}, QUESTION),
        ({"question": "Q", "answer": "A"}, QUESTION),
        ({"question": "Q", "response": "A"}, QUESTION),
        ({"prompt": [ASK], "completion": [ANSWER]}, QUESTION),
        (
            {"system_prompt": "S", "messages": [ASK, ANSWER]},
            [("system", "S"), ("user", "Q"), ("assistant", "A")],
        ),
        (
            {"system": "S", "conversations": [{"from": "human", "value": "Q"}]},
            [("system", "S"), ("user", "Q")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}] * 2}]},
            [("system", "You are kind."), ("user", "QQ")],
        ),
    ],
)
def test_extra_columns_are_in_the_text(tmp_path, monkeypatch, kind, row, turns):
    name = written(kind, tmp_path, [row] * 2, monkeypatch)
    assert read(name) == ([chat(*turns)] * 2, [])


@pytest.mark.parametrize("kind", KINDS)
def test_tools_and_their_calls_are_in_the_text(tmp_path, monkeypatch, kind):
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    rows = [{"tools": [TOOL], "messages": [ASK, calls, {"role": "tool", "content": "20"}, ANSWER]}]
    (text,), notes = read(written(kind, tmp_path, rows, monkeypatch))
    assert "of a city" in text
    behind = text.partition("<|im_start|>user")[2]
    assert behind == (
        "\nQ<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>weather {"city": "Rome"}</tool_call><|im_end|>\n'
        + chat(("tool", "20"), ("assistant", "A"))
    )
    assert notes == []
    _, notes = read(written(kind, tmp_path, rows, monkeypatch), tokenizer_of(TEMPLATES["phi3"]))
    (note,) = notes
    assert all(f"{what} (1)" in note for what in ("calls of tools", "turns of tool", "tools"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_union_is_read_row_by_row(tmp_path, monkeypatch, kind):
    rows = [
        {"text": "T1", "messages": None, "instruction": None, "response": None},
        {"text": None, "messages": [ASK, ANSWER], "instruction": None, "response": None},
        {"text": None, "messages": [ANSWER, ASK], "instruction": None, "response": None},
        {"text": None, "messages": None, "instruction": "I", "response": "R"},
    ]
    found, notes = read(written(kind, tmp_path, rows, monkeypatch))
    kindly = ("system", "You are kind.")
    truth = [
        chat(kindly, ("user", "Q"), ("assistant", "A")),
        chat(kindly, ("assistant", "A"), ("user", "Q")),
        chat(kindly, ("user", "I"), ("assistant", "R")),
        "T1</s>",
    ]
    assert found == sorted(truth)
    assert notes == []
    windows = calibration_windows(spec(written(kind, tmp_path, rows, monkeypatch)), QWEN)
    assert not [note for note in windows.notes if "left out" in note]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_is_counted_by_its_reason(tmp_path, monkeypatch, kind):
    rows = [{"prompt": "Q", "completion": "A", "topic": "birds", "number": 1}] * 4
    rows += [{**rows[0], "completion": ""}, {**rows[0], "prompt": None, "completion": None}]
    name = written(kind, tmp_path, rows, monkeypatch)
    short = {"hub": "org/name6"}.get(kind, f"a.{kind}")
    for tokens in (None, 10**6):
        found, notes = read(name, tokens=tokens)
        assert len(found) == 4
        lost, empty, unread = notes
        assert lost.startswith(f"{short}: 1 rows hold a question without an answer")
        assert empty.startswith(f"{short}: 1 rows hold no text")
        assert unread.startswith(f"{short}: not read, though they hold text: the columns topic (4)")
    windows = calibration_windows(spec(name), QWEN)
    assert windows.notes[:3] == tuple(notes)
    more = written(kind, tmp_path, [*rows[:2], *rows[4:], rows[4]], monkeypatch)
    assert "3 of 5 rows were left out" in problem(more, tokenizer=QWEN)
    assert "3 of 5 rows were left out" in problem(more, tokenizer=QWEN, tokens=100)
    with pytest.raises(DataError, match=r"^\S+: 3 of 5 "):
        calibration_windows(spec(more), QWEN)


def test_more_than_half_without_an_answer_is_an_error(tmp_path):
    rows = [{"messages": [ASK]}] * 3 + [{"messages": [ASK, ANSWER]}] * 2
    name = jsonl(tmp_path / "a.jsonl", rows)
    for tokens in (None, 10**6):
        error = problem(name, tokenizer=QWEN, loss_on="answers", tokens=tokens, held_out=0)
        assert "3 of 5 rows were left out" in error
        assert "3 documents hold nothing to learn from" in error
    assert len(read(name)[0]) == 5


def test_a_stream_of_which_half_is_of_no_use_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LARGE_BYTES", 100)
    rows = [{"prompt": f"Q{i}", "completion": "A" if i % 3 == 0 else ""} for i in range(60)]
    name = jsonl(tmp_path / "a.jsonl", rows)
    for _ in range(2):  # nothing of it is kept
        assert "40 of 60 rows were left out" in problem(name, tokenizer=QWEN, tokens=5000)


def test_parts_that_are_no_text_and_empty_turns_are_counted(tmp_path):
    picture = {"type": "image_url", "image_url": {"url": "x"}}
    question = {"role": "user", "content": [{"type": "text", "text": "Q"}, picture]}
    rows = [{"messages": [{"role": "system", "content": ""}, question, ANSWER]}] * 2
    found, notes = read(jsonl(tmp_path / "a.jsonl", rows))
    assert found == [chat(("system", "You are kind."), ("user", "Q"), ("assistant", "A"))] * 2
    assert notes == [
        "a.jsonl: 2 turns of conversations are empty and were left out.",
        "a.jsonl: 2 parts of messages are no text and were left out (image_url (2)).",
    ]


def test_a_column_that_repeats_the_document_is_not_lost(tmp_path):
    rows = [{"prompt": "Q", "messages": [ASK, ANSWER]}, {"prompt": "Z", "messages": [ASK, ANSWER]}]
    _, notes = read(jsonl(tmp_path / "a.jsonl", rows))
    assert notes == ["a.jsonl: not read, though they hold text: the columns prompt (1)."]


def test_a_field_map_may_name_extra_columns(tmp_path):
    row = {"q": "Q", "a": "A", "about": "C", "rules": "S", "topic": "birds"}
    name = jsonl(tmp_path / "a.jsonl", [row] * 2)
    fields = {"prompt": "q", "answer": "a", "context": "about", "system": "rules"}
    found, notes = read(HealSource(data=name, fields=fields))
    assert found == [chat(("system", "S"), ("user", "Q\n\nC"), ("assistant", "A"))] * 2
    assert notes == ["a.jsonl: not read, though they hold text: the columns topic (2)."]


def test_what_is_thought_stands_before_the_answer(tmp_path):
    rows = [{"prompt": "Q", "completion": "A", "reasoning_content": "T"}]
    (text,), notes = read(jsonl(tmp_path / "a.jsonl", rows), tokenizer_of(TEMPLATES["qwen3"]))
    assert text.endswith("assistant\n<think>\nT\n</think>\n\nA<|im_end|>\n")
    assert notes == []
    _, notes = read(jsonl(tmp_path / "a.jsonl", rows), tokenizer_of(None))
    assert notes == ["a.jsonl: not written without a chat template: reasoning (1)."]


def test_keys_of_other_rows_are_not_written_as_null(tmp_path):
    calls = [
        {"type": "function", "function": {"name": name, "arguments": given}}
        for name, given in (("a", {"city": "Rome"}), ("b", {"day": "today"}))
    ]
    rows = [
        {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]}
        for call in calls
    ]
    found, _ = read(table("parquet", tmp_path / "a.parquet", rows))
    assert found == read(jsonl(tmp_path / "a.jsonl", rows))[0]
    assert "null" not in "".join(found)


def test_functions_called_in_the_old_form(tmp_path):
    called = {"role": "assistant", "content": None}
    call = {"name": "weather", "arguments": '{"city": "Rome"}'}
    old = {"messages": [ASK, {**called, "function_call": call}]}
    bare = {"messages": [ASK, {**called, "tool_calls": json.dumps([call])}]}
    for row in (old, bare):
        (text,), _ = read(jsonl(tmp_path / "a.jsonl", [row]))
        assert '<tool_call>weather {"city": "Rome"}</tool_call>' in text


# ------------------------------------------------------------------------- half characters


@pytest.mark.parametrize("nested", [False, True])
def test_half_a_character_is_replaced_with_its_place(tmp_path, nested):
    half = r"cut \ud83d emoji \ud83d\ude00"
    line = (
        f'{{"messages": [{{"role": "user", "content": "{half}"}}]}}'
        if nested
        else f'{{"text": "{half}"}}'
    )
    lines = '{"text": "fine"}\n' * 3 + line + "\n"
    name = put(tmp_path / "a.jsonl", lines.encode())
    found, notes = read(name, tokenizer_of(None))
    assert "cut � emoji \U0001f600</s>" in found
    assert len(found) == 4
    (note,) = notes
    assert note.startswith("a.jsonl: 1 rows, the first at a.jsonl:4, hold half of a surrogate pair")
    reader = RowReader()
    assert "cut � emoji \U0001f600" in str(list(read_texts(name, reader=reader)))
    assert reader.notes("a.jsonl") == notes


def test_half_a_character_in_a_name_a_licence_or_a_template_is_replaced(tmp_path):
    rows = [{"text": f"{i} words", "li\ud83d": "other", "license": "CC \ud83d"} for i in range(3)]
    text = heal(jsonl(tmp_path / "a.jsonl", rows), tokenizer=tokenizer_of(None), held_out=0)
    assert text.licence == "a.jsonl: CC �"
    assert "the columns li� (3)" in " ".join(text.notes)
    tokenizer = tokenizer_of("{{ 'half \\ud83d ' }}" + TEMPLATES["chatml"])
    (text,), notes = read(jsonl(tmp_path / "b.jsonl", [{"messages": [ASK, ANSWER]}]), tokenizer)
    assert text == "half � " + chat(("user", "Q"), ("assistant", "A"))
    assert len(notes) == 1
    assert "template writes half of a surrogate pair" in notes[0]
    assert answers(tiny_model(vocab_size=len(tokenizer)), tokenizer)


def test_bytes_that_are_no_text_in_a_table_are_named_with_their_row(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    bad = pa.array([b"fine", b"\xed\xa0\xbd"]).cast(pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 2, bad.buffers())
    parquet.write_table(pa.table({"text": strings}), tmp_path / "a.parquet")
    error = problem(str(tmp_path / "a.parquet"))
    assert "a.parquet: row 2: byte 0 of a text is not UTF-8" in error


# ------------------------------------------------------------------------------ held out


@pytest.mark.parametrize("tokens", [None, 10**6])
def test_what_is_held_out_is_not_trained_on_in_other_words_of_space(tmp_path, tokens):
    rows = [{"text": f"row number {i}"} for i in range(40)]
    # In another order: of the same number of rows, the same places are held out.
    copies = [{"text": f" row  number\n{i}"} for i in reversed(range(40))]
    names = [jsonl(tmp_path / "a.jsonl", rows), jsonl(tmp_path / "b.jsonl", copies)]
    tokenizer = tokenizer_of(None)
    text = heal(names, tokenizer=tokenizer, length=64, held_out=20, tokens=tokens)
    aside = texts(HealingText(text.held_out, text.train, "", "", (), 0.0), tokenizer)
    seen = {" ".join(one.removesuffix("</s>").split()) for one in texts(text, tokenizer)}
    held = {" ".join(one.removesuffix("</s>").split()) for one in aside}
    assert len(aside) == 20
    assert not seen & held
    assert seen | held == {row["text"] for row in rows}
    counted = [int(note.split(": ")[1].split()[0]) for note in text.notes if "held out" in note]
    assert sum(counted) == 80 - 20 - len(texts(text, tokenizer)) > 0


def test_rows_that_are_all_the_same_are_trained_on_with_a_note(tmp_path):
    name = jsonl(tmp_path / "a.jsonl", [{"text": "the fox"}] * 50)
    text = heal(name, tokenizer=tokenizer_of(None), length=64)
    assert len(texts(text, tokenizer_of(None))) == 48
    (note,) = text.notes
    assert "every row equals one that is held out" in note


# ------------------------------------------------------------------------- lists in JSON


def test_json_is_read_as_datasets_reads_it(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(5)]
    for number, data in enumerate(
        (json.dumps(rows), "\n " + json.dumps(rows, indent=2), "\n".join(map(json.dumps, rows)))
    ):
        name = put(tmp_path / f"{number}.json", data.encode())
        truth = LOAD("json", data_files=name, split="train", cache_dir=tmp_path / "datasets")
        assert sorted(read_texts(name)) == sorted(truth["text"])
    put(tmp_path / "bom.json", b"\xef\xbb\xbf" + json.dumps(rows).encode())
    assert len(list(read_texts(str(tmp_path / "bom.json")))) == 5


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b'[{"text": "a"},\n {"text": ]', "a.json:2: not JSON"),
        (b'[{"text": "a"}, 3]', "a.json: row 2: int"),
        (b'{"text":\n "a"}', "a.json:1: not JSON"),
        (b"[]", "no rows"),
        (b"", "no rows"),
    ],
)
def test_an_error_names_the_place_in_json_that_is_no_table(tmp_path, data, error):
    assert error in problem(put(tmp_path / "a.json", data))
