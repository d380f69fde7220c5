"""Text from every kind of file."""

from __future__ import annotations

import gzip
import json
from typing import Any

import datasets
import pytest
from helpers_data import alone as alone
from helpers_data import (
    jsonl,
    parquet_bytes,
    put,
    table,
)

from llmslim.data import read_texts, sources
from llmslim.errors import DataError

TEXTS = ["One fish.", "Two\nfish.", "Red fish, blue fish — ünï."]


def message(**problem: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(read_texts(**problem))
    return str(caught.value)


@pytest.mark.parametrize("ending", [".txt", ".TXT", ".raw", ".tokens", ".md", ".txt.gz", ".raw.gz"])
def test_a_text_file_is_one_document(tmp_path, ending):
    text = "One.\n\n" + TEXTS[2]
    assert list(read_texts(put(tmp_path / f"a{ending}", text.encode()))) == [text]


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_row_of_a_table_is_read_once(tmp_path, kind, gz):
    rows = [{"text": text, "other": 1} for text in [*TEXTS, "", "  \n"]]
    name = table(kind, tmp_path / f"a.{kind}{gz}", [*rows, {"text": None, "other": 1}])
    assert sorted(read_texts(name)) == sorted(TEXTS)


def test_the_order_of_rows_comes_from_the_seed(tmp_path):
    rows = [{"text": f"t{i}"} for i in range(50)]
    grouped = put(tmp_path / "a.parquet", parquet_bytes(rows, row_group_size=7))
    for name in (jsonl(tmp_path / "a.jsonl", rows), grouped):
        first, again, other = (list(read_texts(name, seed=seed)) for seed in (1, 1, 2))
        assert first == again != other
        assert sorted(first) == sorted(other) == sorted(row["text"] for row in rows)


def test_a_bounded_buffer_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_BUFFER_ROWS", 5)
    rows = [{"text": f"t{i}"} for i in range(50)]
    read = list(read_texts(jsonl(tmp_path / "a.jsonl", rows)))
    assert sorted(read) == sorted(row["text"] for row in rows)
    assert read != [row["text"] for row in rows]


def test_a_full_buffer_draws_rows_of_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_BUFFER_ROWS", 5)
    rows = [{"text": f"{i}"} for i in range(50)]
    first = {next(read_texts(jsonl(tmp_path / "a.jsonl", rows), seed=s)) for s in range(20)}
    assert first == {"0", "1", "2", "3", "4", "5"}


ASK, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("row", "document"),
    [
        ({"content": "C"}, "C"),
        ({"messages": [ASK, ANSWER]}, [ASK, ANSWER]),
        ({"messages": [{"role": "system", "content": ""}, ASK]}, [ASK]),
        ({"conversations": [{"from": "human", "value": "Q"}]}, [ASK]),
        ({"conversations": [{"from": "gpt", "value": "A"}]}, [ANSWER]),
        ({"instruction": "Q", "response": "A", "license": "x"}, [ASK, ANSWER]),
        ({"prompt": "Q", "completion": "A"}, [ASK, ANSWER]),
        ({"prompt": [ASK], "completion": [ANSWER]}, [ASK, ANSWER]),
        ({"prompt": "Q", "completion": ""}, None),
        ({"messages": [{"role": "user", "content": None}]}, None),
    ],
)
def test_layouts(tmp_path, kind, row, document):
    read = list(read_texts(table(kind, tmp_path / f"a.{kind}", [row])))
    assert read == ([] if document is None else [document])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_other_columns_are_listed(tmp_path, kind):
    name = table(kind, tmp_path / f"a.{kind}", [{"goal": "x", "sol1": "y"}])
    error = message(name_or_path=name)
    assert f"a.{kind}" in error
    assert "has the columns goal, sol1; one of text, content" in error
    assert "instruction+response" in error


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"text": 3}, "text holds a int"),
        ({"messages": "hi"}, "messages holds a str"),
        ({"messages": [{"name": "x"}]}, "keys name; role and content are needed"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages holds a list"),
        ([1], "list; every line is one JSON object"),
    ],
)
def test_an_error_names_the_line_of_a_row_that_is_not_text(tmp_path, row, error):
    name = jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, row])
    assert message(name_or_path=name).startswith(f"{name}:2: ")
    assert error in message(name_or_path=name)


def test_a_malformed_line_is_named(tmp_path):
    name = put(tmp_path / "a.jsonl.gz", b'{"text": "a"}\n\n{"text": "b\n')
    assert f"{name}:3: not JSON" in message(name_or_path=name)
    name = put(tmp_path / "b.jsonl", b"[" * 100_000)
    assert f"{name}:1: not JSON" in message(name_or_path=name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_other_encodings_are_refused(tmp_path, name):
    assert "is not UTF-8" in message(name_or_path=put(tmp_path / name, b'{"text": "\xfc"}'))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.parquet.gz"])
def test_a_gzip_cut_short_or_no_gzip_is_an_error(tmp_path, name):
    path = tmp_path / name
    rows = [{"text": f"{i * i:x} {i**9:x}"} for i in range(500)]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    whole = gzip.compress(parquet_bytes(rows) if "parquet" in name else lines)
    for data in (whole[: len(whole) // 2], whole[:-4], b"plain text, not packed"):
        path.write_bytes(data)
        assert f"{path}: not a whole gzip file" in message(name_or_path=str(path))


def test_a_parquet_cut_short_is_an_error(tmp_path):
    whole = parquet_bytes([{"text": f"{i**9:x}"} for i in range(500)])
    for data in (whole[: len(whole) // 2], whole[:-4], b"", b"plain"):
        name = put(tmp_path / "a.parquet", data)
        assert f"{name}: not a whole Parquet file" in message(name_or_path=name)


def test_what_is_no_file_of_text_is_an_error(tmp_path):
    assert "a folder; a file is needed" in message(name_or_path=str(tmp_path))
    assert "ends in .xls; allowed are .txt" in message(name_or_path=put(tmp_path / "a.xls", b"a"))
    for name in ("absent.txt", "./absent", "/absent", "~/absent", "ab sent", "a.jsonl.gz"):
        assert message(name_or_path=name) == f"{name}: no such file. Check the path."
    assert "empty name" in message(name_or_path=" ")


def test_without_a_network_the_hub_is_one_sentence():
    for name in ("nobody/nothing", "nobody/nothing:config:test", "lamini"):
        error = message(name_or_path=name)
        assert error.startswith(f"{name}: not a local file, and no data set of the hub")
        assert "\n" not in error


def test_a_name_on_the_hub_may_name_config_and_split(tmp_path, monkeypatch):
    local = table("parquet", tmp_path / "a.parquet", [{"instruction": "Q", "response": "A"}])
    load, calls = datasets.load_dataset, []

    def stand_in(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        calls.append((name, config, split))
        return load("parquet", data_files={split: local}, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    for name in ("org/name", "name:config", "org/name:config:test", "name::test[:10]", "lamini"):
        assert list(read_texts(name, seed=-1)) == [[ASK, ANSWER]]
    assert calls == [
        ("org/name", None, "train"),
        ("name", "config", "train"),
        ("org/name", "config", "test"),
        ("name", None, "test[:10]"),
        ("MBZUAI/LaMini-instruction", None, "train"),
    ]
