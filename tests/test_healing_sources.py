"""Sources of text for healing: what they hold, how they are split, weighted and streamed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import datasets
import numpy as np
import pytest
from helpers_checkpoint import tiny_tokenizer
from helpers_data import alone as alone
from helpers_data import jsonl, put, table
from helpers_healing_data import (
    PAIRS,
    everything,
    heal,
    hub,
    pairs,
    texts_in,
    write_csv,
)

from llmslim.data import sources
from llmslim.data.healing import Part, split
from llmslim.data.prompts import Encoder
from llmslim.data.sources import REFUSALS, Source
from llmslim.recipe.schema import Heal, HealSource

# ------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_every_row_of_a_file_is_used_once(tmp_path, kind, gz):
    path = tmp_path / f"a.{kind}{gz}"
    name = write_csv(path, pairs()) if kind == "csv" else table(kind, path, pairs())
    text = heal(name, length=66)  # six rows of eleven tokens
    assert everything(text) == sorted(q + a for q, a in PAIRS)
    assert (text.source, text.notes) == (path.name, ())
    assert text.licence == f"{path.name}: as given by the file's owner"
    assert text.padding == text.train.padding < 0.06


@pytest.mark.parametrize(
    ("row", "fields", "truth"),
    [
        ({"q": "Q", "a": "A"}, {"prompt": "q", "answer": "a"}, "<user>Q<assistant>A"),
        (
            {"q": "Q", "a": "A", "s": "S"},
            {"prompt": "q", "answer": "a", "system": "s"},
            "<system>S<user>Q<assistant>A",
        ),
        (
            {"q": "Q", "a": "A", "s": ""},
            {"system": "s", "prompt": "q", "answer": "a"},
            "<user>Q<assistant>A",
        ),
        ({"body": "B" * 9}, {"text": "body"}, "B" * 9),
        # The map wins over a layout that is known.
        ({"text": "T", "body": "B" * 9}, {"text": "body"}, "B" * 9),
        ({"turns": [{"from": "human", "value": "Q"}]}, {"messages": "turns"}, "<user>Q"),
        ({"messages": [{"role": "user", "content": "Q"}]}, None, "<user>Q"),
    ],
)
def test_field_maps(tmp_path, row, fields, truth):
    name = jsonl(tmp_path / "a.jsonl", [row] * 2)
    text = heal(HealSource(data=name, fields=fields), tokenizer=tiny_tokenizer())
    assert everything(text) == [truth] * 2


def test_a_csv_with_commas_line_ends_and_quotes_in_its_fields(tmp_path):
    rows = [{"prompt": 'a,"b"\nc', "completion": "x" * 200_000}, *pairs()]
    text = heal(write_csv(tmp_path / "a.csv", rows), length=1024, held_out=0)
    found = texts_in(text.train)
    assert 'a,"b"c' + "x" * 1018 in found  # the tiny tokenizer has no line ends
    assert sum(one.count("x") for one in found) == 200_000


def test_a_plain_text_is_cut_into_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_DOCUMENT_CHARACTERS", 30)
    lines = [f"line{i:04}" for i in range(100)]
    text = heal(put(tmp_path / "a.txt.gz", "\n".join(lines).encode()), length=128)
    assert "".join(everything(text)) == "".join(lines)
    assert len(text.held_out)


def test_licences_are_read_from_the_rows(tmp_path):
    rows = [{**row, "license": f"L{i % 2}"} for i, row in enumerate(pairs())]
    other = jsonl(tmp_path / "b.jsonl", pairs())
    for kind in ("jsonl", "parquet"):
        name = table(kind, tmp_path / f"a.{kind}", rows)
        for _ in range(2):  # read, and from the cache
            licence = heal([name, other]).licence
            assert licence == f"a.{kind}: L0; L1, b.jsonl: as given by the file's owner"


# ----------------------------------------------------------------------------- filter, split


def test_lamini_is_filtered_and_split_as_datasets_does_it(tmp_path, monkeypatch):
    rows = [
        {"instruction": f"Q{i}", "response": f"A{i * 7}", "instruction_source": "alpaca"}
        for i in range(5300)
    ]
    for i, refusal in enumerate(REFUSALS):
        rows[i * 5]["response"] += f" {refusal} sure."
        rows[i * 5 + 1]["instruction"] = refusal
        rows[i * 5 + 2]["response"] = refusal.upper()  # another thing
    rows[77]["response"] = ""  # counts for the split, but there is nothing to learn from it
    local = table("parquet", tmp_path / "a.parquet", rows)
    # Written out: a change of the list must not go unseen.
    phrases = ["I am not", "I am an AI", "I do not", "I cannot", "t goes against my"]
    phrases += ["t is not my", "I don't have"]
    kept = datasets.Dataset.from_list(rows).filter(
        lambda row: not any(p in row["instruction"] + "|" + row["response"] for p in phrases)
    )
    truth = kept.train_test_split(test_size=5000, seed=42)

    def texts(part: Any) -> list[str]:
        texts = [row["instruction"] + row["response"] for row in part if row["response"]]
        return sorted(one.replace(" ", "") for one in texts)

    calls = hub(monkeypatch, local)
    text = heal("lamini", length=512)
    assert calls == [("MBZUAI/LaMini-instruction", None, "train", False)]
    assert sorted(texts_in(text.held_out)) == texts(truth["test"])
    assert sorted(texts_in(text.train)) == texts(truth["train"])
    assert text.source == "lamini"
    assert text.licence == "lamini: CC BY-NC 4.0"
    assert text.notes == (
        "lamini: 1 rows hold a question without an answer or an answer without a question, and "
        "were left out.",
        "lamini: not read, though they hold text: the columns instruction_source (5299).",
        "lamini: 14 rows hold a refusal and were left out.",
    )
    # The same rows are held out when only some are tokenised.
    some = heal("lamini", length=512, tokens=300)
    assert sorted(texts_in(some.held_out)) == texts(truth["test"])
    assert set(texts_in(some.train)) < set(texts_in(text.train))


def test_the_filter_can_be_switched(tmp_path, monkeypatch):
    rows = [*pairs("instruction", "response"), {"instruction": "Q", "response": "I cannot."}]
    local = table("parquet", tmp_path / "a.parquet", rows)
    hub(monkeypatch, local)
    unfiltered = HealSource(data="lamini", filter="none")
    assert "QIcannot." in everything(heal(unfiltered, held_out=3))
    assert "QIcannot." in everything(heal(local))
    assert "QIcannot." not in everything(heal(HealSource(data=local, filter="refusals")))


@pytest.mark.parametrize(
    ("rows", "aside"), [(1, 0), (2, 1), (59, 2), (60, 3), (19_999, 999), (25_000, 1000)]
)
def test_a_twentieth_is_held_out_at_most_a_thousand(rows, aside):
    source = Source("a", "", "", items=lambda: iter(()))
    part = Part(source, 1.0, np.ones(rows, dtype=np.int64))
    split([part], Heal())
    assert len(part.held_out) == aside
    assert sorted([*part.held_out, *part.train]) == list(range(rows))


@pytest.mark.parametrize("aside", [0, 7])
def test_the_number_of_held_out_rows_can_be_set(tmp_path, aside):
    text = heal(jsonl(tmp_path / "a.jsonl", pairs()), held_out=aside)
    assert len(texts_in(text.held_out)) == aside
    assert everything(text) == sorted(q + a for q, a in PAIRS)


def test_rows_come_from_the_seed(tmp_path):
    name = jsonl(tmp_path / "a.jsonl", pairs())
    one, again, other = (heal(name, seed=seed) for seed in (1, 1, 2))
    assert texts_in(one.train) == texts_in(again.train) != texts_in(other.train)
    assert set(texts_in(one.held_out)) == set(texts_in(again.held_out))
    assert set(texts_in(one.held_out)) != set(texts_in(other.held_out))


# ------------------------------------------------------------------------------- mixtures


def test_weights_are_how_often_a_row_is_seen(tmp_path):
    names = [
        jsonl(tmp_path / f"{letter}.jsonl", [{"text": f"{letter}{i:03}"} for i in range(40)])
        for letter in "xyz"
    ]
    weights = (1.0, 2.5, 0.25)
    mixture = tuple(
        HealSource(data=name, weight=weight) for name, weight in zip(names, weights, strict=True)
    )
    text = heal(mixture, held_out=0)
    seen = Counter(texts_in(text.train))
    assert text.source == "x.jsonl, y.jsonl, z.jsonl"
    times = {letter: Counter(n for t, n in seen.items() if t[0] == letter) for letter in "xyz"}
    assert times == {"x": {1: 40}, "y": {2: 20, 3: 20}, "z": {1: 10}}
    aside = heal(mixture, held_out=30)
    assert Counter(t[0] for t in texts_in(aside.held_out)) == {"x": 10, "y": 10, "z": 10}
    assert not set(texts_in(aside.held_out)) & set(texts_in(aside.train))


def test_only_the_wanted_tokens_are_there_and_tokenised(tmp_path, monkeypatch):
    name = jsonl(tmp_path / "a.jsonl", [{"text": f"{i:09}"} for i in range(2000)])
    whole, encoded = heal(name), []
    call = Encoder.__call__

    def counting(self: Encoder, documents: Any) -> Any:
        encoded.extend(document for document in documents if document)
        return call(self, documents)

    monkeypatch.setattr(Encoder, "__call__", counting)
    text = heal(name, tokens=1005)
    assert text.train.tokens == 1010  # ten tokens each
    assert set(texts_in(text.train)) < set(texts_in(whole.train))
    assert set(texts_in(text.held_out)) == set(texts_in(whole.held_out))
    assert len(encoded) < 700
    assert heal(name, tokens=10**6).train.tokens == whole.train.tokens


def test_what_is_large_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LARGE_BYTES", 1000)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    rows = [{"text": f"{i:09}"} for i in range(3000)]
    name = jsonl(tmp_path / "a.jsonl", rows)
    local = table("parquet", tmp_path / "a.parquet", rows)
    calls = hub(monkeypatch, local, download_size=None, license="mit")
    for data, licence in ((name, "the file's owner"), (local, "owner"), ("org/big", "mit")):
        text = heal(data, tokens=2000, seed=3)
        assert text.train.tokens >= 2000
        assert len(everything(text)) < 2100
        assert set(everything(text)) <= {row["text"] for row in rows}
        assert "only as far as needed" in text.notes[0]
        assert text.licence.endswith(licence)
    assert calls == [("org/big", None, "train", True)]
    assert len(everything(heal("org/big"))) == 3000
    assert calls[-1] == ("org/big", None, "train", False)


def test_the_licences_of_a_stream_are_those_of_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LARGE_BYTES", 1000)
    rows = [{"text": f"{i:09}", "license": f"L{i}"} for i in range(4)] * 500
    text = heal(jsonl(tmp_path / "a.jsonl", rows), tokens=2000)
    assert text.licence == "a.jsonl: L0; L1; L2; L3"


def test_text_is_not_held_in_memory(tmp_path, monkeypatch):
    ahead, most = 0, 0
    read = datasets.Dataset.from_list([{"text": f"{i:05}"} for i in range(5000)])

    def rows(given: str) -> Any:
        def each() -> Any:
            nonlocal ahead, most
            for row in read:
                ahead += 1
                most = max(most, ahead)
                yield row

        return len(read), each()

    call = Encoder.__call__

    def encode(self: Encoder, documents: Any) -> Any:
        nonlocal ahead
        ahead -= len(documents)
        return call(self, documents)

    hub(monkeypatch, "")
    monkeypatch.setattr(sources, "downloaded_rows", rows)
    monkeypatch.setattr(Encoder, "__call__", encode)
    assert len(everything(heal("org/name"))) == 5000
    assert most <= 1024


def test_progress_ends_at_the_whole(tmp_path):
    seen: list[tuple[int, int, str]] = []
    name = table("parquet", tmp_path / "a.parquet", pairs())
    heal(name, progress=lambda *at: seen.append(at))
    assert seen[-1] == (60, 60, "tokenising")
