"""Data to heal with: sources, filter, split, templates, loss masks, mixtures, the cache, `self`."""

from __future__ import annotations

import csv
import errno
import io
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers_checkpoint import tiny_tokenizer
from test_data import jsonl, plain_tokenizer, put, table, with_start
from test_packing import samples_in
from tiny import tiny_model

from llmslim.data import HealingText, Rows, healing_text
from llmslim.data import conversations as talks
from llmslim.data.mixture import Part, split
from llmslim.data.prompts import Encoder
from llmslim.data.sources import REFUSALS, Source
from llmslim.errors import DataError
from llmslim.recipe.schema import Heal, HealSource

EOS = 1


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and a cache folder of the test's own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def heal(data: Any, *, tokenizer: Any = None, length: int = 64, **options: Any) -> HealingText:
    passing = {key: options.pop(key) for key in ("teacher", "cache", "progress") if key in options}
    return healing_text(
        Heal(data=data, **options),
        plain_tokenizer() if tokenizer is None else tokenizer,
        context_length=length,
        **passing,
    )


def problem(data: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        heal(data, **options)
    return str(caught.value)


def texts_in(rows: Rows, *, learned: bool = False) -> list[str]:
    """Return every sample's text without its end token; or only what is learned of it."""
    tokenizer = tiny_tokenizer()
    found = []
    for index in range(len(rows)):
        for ids, labels in samples_in(rows[index]):
            if any(label != -100 for label in labels):
                kept = [i for i, label in zip(ids, labels, strict=True) if label != -100]
                found.append(tokenizer.decode([i for i in (kept if learned else ids) if i > EOS]))
    return found


def everything(text: HealingText) -> list[str]:
    return sorted(texts_in(text.train) + texts_in(text.held_out))


# ------------------------------------------------------------------------------- sources

PAIRS = [(f"Q{i:03}", f"A{i * i:05}") for i in range(60)]


def pairs(question: str = "prompt", answer: str = "completion") -> list[dict[str, Any]]:
    return [{question: q, answer: a} for q, a in PAIRS]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return put(path, text.getvalue().encode())


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
    ("row", "fields", "said"),
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
def test_field_maps(tmp_path, row, fields, said):
    name = jsonl(tmp_path / "a.jsonl", [row] * 2)
    text = heal(HealSource(data=name, fields=fields), tokenizer=tiny_tokenizer())
    assert everything(text) == [said] * 2


def test_a_csv_with_commas_line_ends_and_quotes_in_its_fields(tmp_path):
    rows = [{"prompt": 'a,"b"\nc', "completion": "x" * 200_000}, *pairs()]
    text = heal(write_csv(tmp_path / "a.csv", rows), length=1024, held_out=0)
    found = texts_in(text.train)
    assert 'a,"b"c' + "x" * 1018 in found  # the tiny tokenizer has no line ends
    assert sum(one.count("x") for one in found) == 200_000


def test_a_plain_text_is_cut_into_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("llmslim.data.sources._STRETCH_CHARACTERS", 30)
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


def hub(monkeypatch: pytest.MonkeyPatch, local: str, **info: Any) -> list[Any]:
    """Let a local parquet file stand for every data set of the hub; return what is asked for."""
    load, asked = datasets.load_dataset, []

    def stand_in(name: str, config: str | None, *, split: str, streaming: bool = False) -> Any:
        asked.append((name, config, split, streaming))
        return load("parquet", data_files={split: local}, split=split, streaming=streaming)

    known = SimpleNamespace(**{"license": "", "download_size": 1000, **info})
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda *_: SimpleNamespace(info=known, hash="1")
    )
    return asked


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
        asked = [row["instruction"] + row["response"] for row in part if row["response"]]
        return sorted(one.replace(" ", "") for one in asked)

    asked = hub(monkeypatch, local)
    text = heal("lamini", length=512)
    assert asked == [("MBZUAI/LaMini-instruction", None, "train", False)]
    assert sorted(texts_in(text.held_out)) == texts(truth["test"])
    assert sorted(texts_in(text.train)) == texts(truth["train"])
    assert text.source == "lamini"
    assert text.licence == "lamini: CC BY-NC 4.0"
    assert text.notes == ("lamini: 14 rows hold a refusal and were left out.",)
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
    none = np.zeros(0, dtype=np.int64)
    source = Source("a", "", "", items=lambda: iter(()))
    part = Part(source, 1.0, np.ones(rows, dtype=np.int64), None, none, none)
    split([part], Heal())
    assert len(part.held_out) == aside
    assert sorted([*part.held_out, *part.train]) == list(range(rows))


@pytest.mark.parametrize("aside", [0, 7])
def test_held_out_as_asked(tmp_path, aside):
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


def test_weights_say_how_often_a_row_is_seen(tmp_path):
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


def test_only_the_tokens_asked_for_are_there_and_tokenised(tmp_path, monkeypatch):
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
    monkeypatch.setattr("llmslim.data.sources._LARGE_BYTES", 1000)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    rows = [{"text": f"{i:09}"} for i in range(3000)]
    name = jsonl(tmp_path / "a.jsonl", rows)
    local = table("parquet", tmp_path / "a.parquet", rows)
    asked = hub(monkeypatch, local, download_size=None, license="mit")
    for data, licence in ((name, "the file's owner"), (local, "owner"), ("org/big", "mit")):
        text = heal(data, tokens=2000, seed=3)
        assert text.train.tokens >= 2000
        assert len(everything(text)) < 2100
        assert set(everything(text)) <= {row["text"] for row in rows}
        assert "only as far as needed" in text.notes[0]
        assert text.licence.endswith(licence)
    assert asked == [("org/big", None, "train", True)]
    assert len(everything(heal("org/big"))) == 3000
    assert asked[-1] == ("org/big", None, "train", False)


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
    monkeypatch.setattr("llmslim.data.sources.downloaded_rows", rows)
    monkeypatch.setattr(Encoder, "__call__", encode)
    assert len(everything(heal("org/name"))) == 5000
    assert most <= 1024


def test_progress_ends_at_the_whole(tmp_path):
    seen: list[tuple[int, int, str]] = []
    name = table("parquet", tmp_path / "a.parquet", pairs())
    heal(name, progress=lambda *at: seen.append(at))
    assert seen[-1] == (60, 60, "tokenising")


# --------------------------------------------------------------------- templates, loss masks


def tagged_tokenizer() -> Any:
    tokenizer = with_start(plain_tokenizer())
    tags = ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tags})
    return tokenizer


def test_the_reports_template(tmp_path):
    name = jsonl(tmp_path / "a.jsonl", [{"instruction": "Q", "response": "A"}])
    rows = jsonl(tmp_path / "b.jsonl", [{"instruction": "Q", "response": "A"}] * 2)
    tokenizer = tagged_tokenizer()
    text = heal(rows, tokenizer=tokenizer, template="report", length=16, held_out=0)
    (row,) = text.train
    written = "<|user|>Q<|end|><|assistant|>A<|end|><|endoftext|>"
    ids = [0, *tokenizer(written, add_special_tokens=False)["input_ids"]]
    assert len(ids) == 8  # a token each: the start, Q, A and five tags
    assert row["input_ids"].tolist() == ids * 2
    assert row["labels"].tolist() == [-100, *ids[1:]] * 2
    answers = heal(rows, tokenizer=tokenizer, template="report", length=16, loss_on="answers")
    assert answers.train[0]["labels"][:8].tolist() == [-100] * 5 + ids[5:]
    assert text.notes == ()
    (note,) = heal([name, rows], template="report").notes
    assert "no token for <|user|>, <|assistant|>, <|end|>, <|endoftext|>" in note


CHATML = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}~{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]


def masked(template: str | None, document: Any, **options: Any) -> tuple[str, str, Counter[str]]:
    """Return what a document becomes, and the part of it that is learned."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, loss_on="answers", **options)
    (ids,) = encoder([document])
    whole = tokenizer.decode([i if i >= 0 else ~i for i in ids.tolist()])
    return whole, tokenizer.decode([i for i in ids.tolist() if i >= 0]), encoder.counts


@pytest.mark.parametrize(
    ("template", "document", "whole", "learned", "happened"),
    [
        (CHATML, TALK[:2], "[user]Q1~[assistant]A1~", "A1~", {}),
        (
            CHATML,
            TALK,
            "[user]Q1~[assistant]A1~[user]Q2~[assistant]A2~",
            "A1~A2~",
            {},
        ),
        # Earlier answers are rewritten: the text of the first turns is no beginning of the whole.
        (
            "{% for m in messages %}[{{ m['role'] }}]"
            "{{ m['content'] if loop.last else m['content'][:1] }}~{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}",
            TALK,
            "[user]Q~[assistant]A~[user]Q~[assistant]A2~",
            "[user]Q~[assistant]A~[user]Q~[assistant]A2~",
            {"whole": 1},
        ),
        # Nothing says that the answer comes: its tag is learned with it.
        (
            "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}~{% endfor %}",
            TALK[:2],
            "[user]Q1~[assistant]A1~",
            "[assistant]A1~",
            {},
        ),
        (CHATML, [*TALK[:1], {**TALK[1], "unfinished": True}], "[user]Q1~[assistant]A1", "A1", {}),
        (None, TALK[:2], "Q1A1</s>", "A1</s>", {}),
        (None, [*TALK[:1], {**TALK[1], "unfinished": True}], "Q1A1", "A1", {}),
        (CHATML, TALK[:1], "", "", {"silent": 1}),
        (CHATML, "text", "text</s>", "text</s>", {"whole": 1}),
        ("{{ raise_exception('no') }}", TALK[:2], "Q1A1</s>", "A1</s>", {"refused": 1}),
        (CHATML, None, "", "", {}),
        (CHATML, "", "", "", {}),
    ],
)
def test_answers_are_found_in_any_template(template, document, whole, learned, happened):
    assert masked(template, document) == (whole, learned, Counter(happened))


def test_a_token_across_the_border_is_learned():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(["q", ":", "a", ":a", "</s>"])},
            merges=[(":", "a")],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if loop.first %} :{% endif %}{% endfor %}"
    )
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (ids,) = Encoder(tokenizer, loss_on="answers")([turns])
    assert ids.tolist() == [~0, 3]


def test_masks_reach_the_labels(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    rows = [{"messages": TALK}, {"text": "plain"}, {"messages": TALK[:1]}]
    names = [jsonl(tmp_path / f"{i}.jsonl", [row] * 2) for i, row in enumerate(rows)]
    text = heal(names[:2], tokenizer=tokenizer, loss_on="answers", held_out=0)
    assert sorted(texts_in(text.train, learned=True)) == ["A1~A2~"] * 2 + ["lain"] * 2
    assert text.notes == (
        "1.jsonl: 2 documents have no answers that can be told apart in the text; the loss falls "
        "on all of each.",
    )
    said = problem(names[2], tokenizer=tokenizer, loss_on="answers")
    assert "2.jsonl: no text is left" in said
    assert "2 documents hold nothing to learn from" in said


def test_plain_texts_begin_and_end_as_the_tokenizer_has_it(tmp_path):
    tokenizer = with_start(tiny_tokenizer())
    text = heal(jsonl(tmp_path / "a.jsonl", [{"text": "ab"}] * 2), tokenizer=tokenizer, length=4)
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert text.train[0]["input_ids"].tolist() == [0, a, b, EOS]
    # A chat template brings its own.
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = [{"prompt": "a", "completion": "b"}] * 2
    text = heal(jsonl(tmp_path / "b.jsonl", rows), tokenizer=tokenizer, length=2)
    assert text.train[0]["input_ids"].tolist() == [a, b]


def test_long_documents_are_cut_with_a_note(tmp_path):
    name = jsonl(tmp_path / "a.jsonl", [{"text": "x" * 30}, {"text": "y"}, {"text": "z"}])
    text = heal(name, length=8, held_out=0)
    assert "".join(texts_in(text.train)).count("x") == 30
    assert text.notes == (
        "a.jsonl: 1 documents are longer than the context of 8 tokens and were cut into pieces.",
    )


# --------------------------------------------------------------------------------- cache


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Encoder, "__call__", refuse)


def test_tokens_are_kept_for_this_content_tokenizer_and_template(tmp_path, monkeypatch):
    cache = tmp_path / "ids"
    name = jsonl(tmp_path / "a.jsonl", pairs())
    one = heal(name, cache=cache)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    with monkeypatch.context() as patch:
        forbid(patch)
        copy = put(tmp_path / "b.jsonl", Path(name).read_bytes())
        assert texts_in(heal(copy, cache=cache).train) == texts_in(one.train)
        assert texts_in(heal(name, cache=cache, length=32, seed=7).train)  # drawn from the same
    heal(name, cache=cache, tokenizer=tiny_tokenizer())  # a chat template
    heal(name, cache=cache, tokenizer=tagged_tokenizer())
    heal(name, cache=cache, template="report")
    heal(name, cache=cache, loss_on="answers")
    heal(HealSource(data=name, filter="refusals"), cache=cache)
    heal(HealSource(data=name, fields={"text": "prompt"}), cache=cache)
    heal(jsonl(tmp_path / "a.jsonl", pairs()[:-1]), cache=cache)
    assert len(list(cache.iterdir())) == 8
    jsonl(tmp_path / "a.jsonl", pairs())
    for damage in (b"", whole[:-3], b"something else"):
        file.unlink()  # not in place: what is mapped must stay
        file.write_bytes(damage)
        assert texts_in(heal(name, cache=cache).train) == texts_in(one.train)
        assert file.read_bytes() == whole


def test_the_user_s_cache_is_the_default(tmp_path):
    heal(jsonl(tmp_path / "a.jsonl", pairs()))
    assert len(list((tmp_path / "cache" / "llmslim" / "tokens").iterdir())) == 1


def test_an_interrupted_run_leaves_nothing_half_written(tmp_path, monkeypatch):
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    cache = tmp_path / "ids"
    name = jsonl(tmp_path / "a.jsonl", pairs())
    with pytest.raises(KeyboardInterrupt):
        heal(name, cache=cache, progress=stop)
    assert not list(cache.iterdir())


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llmslim.data.tokens._finish", full)
    cache = tmp_path / "ids"
    said = problem(jsonl(tmp_path / "a.jsonl", pairs()), cache=cache)
    assert said.startswith(f"{cache}: tokens cannot be written there (no space left)")
    assert not list(cache.iterdir())


def test_without_a_writable_cache_files_go_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "passing"))
    (tmp_path / "passing").mkdir()
    (tmp_path / "file").write_text("")
    text = heal(jsonl(tmp_path / "a.jsonl", pairs()), cache=tmp_path / "file")
    assert len(list((tmp_path / "passing").iterdir())) == 1
    assert len(everything(text)) == 60
    del text
    assert not list((tmp_path / "passing").iterdir())


# -------------------------------------------------------------------------------- errors


def test_what_is_wrong_with_the_data_is_said(tmp_path):
    name = jsonl(tmp_path / "a.jsonl", [{"goal": "x", "sol1": "y"}])
    assert "a.jsonl:1: has the columns goal, sol1; one of text" in problem(name)
    wrong = HealSource(data=name, fields={"prompt": "goal", "answer": "sol3"})
    assert "a.jsonl:1: fields names sol3; the columns are goal, sol1." in problem(wrong)
    wrong = HealSource(data=name, fields={"prompt": "goal"})
    assert "fields has prompt; allowed are text; messages; prompt, answer;" in problem(wrong)
    parquet = table("parquet", tmp_path / "a.parquet", [{"goal": "x"}])
    wrong = HealSource(data=parquet, fields={"text": "body"})
    assert "a.parquet: fields names body; the columns are goal." in problem(wrong)


@pytest.mark.parametrize("tokens", [None, 100])
def test_nothing_to_train_on_is_said(tmp_path, tokens):
    name = put(tmp_path / "a.jsonl", b"\n \n")
    assert problem(name, tokens=tokens).startswith("a.jsonl: no rows; text to train on is needed")
    name = jsonl(tmp_path / "b.jsonl", [{"text": ""}, {"text": None}])
    assert problem(name, tokens=tokens).startswith("b.jsonl: 2 rows, none with text in it;")
    name = jsonl(tmp_path / "c.jsonl", [{"prompt": "Who?", "completion": "I cannot say."}] * 3)
    said = problem(HealSource(data=name, filter="refusals"), tokens=tokens)
    assert said.startswith("c.jsonl: no text is left. c.jsonl: 3 rows hold a refusal")
    for name in (put(tmp_path / "d.txt", b" \n"), put(tmp_path / "d.csv", b"")):
        assert "no rows" in problem(name, tokens=tokens)


def test_a_csv_without_a_header_is_told(tmp_path):
    name = put(tmp_path / "a.csv", b"What is it?,A cat.\nAnd that?,A dog.\n")
    said = problem(name)
    assert "a.csv:2 (columns named by line 1): has the columns What is it?, A cat.; one of" in said
    name = put(tmp_path / "b.csv", b"prompt,completion\nA,B\nA,B,C\n")
    assert "b.csv:3: 3 fields; the first line names 2 columns, prompt, completion." in problem(name)
    name = put(tmp_path / "c.csv", b'prompt,completion\nA,"B\n')
    assert "c.csv:2: not CSV (" in problem(name)
    assert "is not UTF-8" in problem(put(tmp_path / "d.csv", b"text\n\xfc\n"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.parquet", "a.parquet.gz"])
def test_files_cut_short_are_told_and_nothing_is_kept(tmp_path, name):
    rows = [{"text": f"{i**9:x}"} for i in range(900)]
    path = tmp_path / name
    if "csv" in name:
        write_csv(path, rows)
    else:
        table("jsonl" if "jsonl" in name else "parquet", path, rows)
    path.write_bytes(path.read_bytes()[:-200])
    cache = tmp_path / "ids"
    kind = "gzip" if name.endswith(".gz") else "Parquet"
    assert problem(str(path), cache=cache).startswith(f"{path}: not a whole {kind} file")
    assert not list(cache.iterdir())


def test_what_cannot_be_done_is_said(tmp_path):
    name = jsonl(tmp_path / "a.jsonl", pairs())
    assert "heal.held_out: 60; a.jsonl has 60 rows" in problem(name, held_out=60)
    assert "a row needs 2 tokens or more" in problem(name, length=1)
    assert "sampled from the dense model; there is none here" in problem("self")
    assert problem(str(tmp_path / "absent.jsonl")).endswith("no such file. Check the path.")
    assert "no data set of the hub could be read" in problem("nobody/nothing")
    with pytest.raises(DataError, match="no tokenizer"):
        healing_text(Heal(data=name), None, context_length=8)
    with pytest.raises(DataError, match=r"lamini has 61 rows"):
        heal_lamini_of(tmp_path, 61)


def heal_lamini_of(tmp_path: Path, rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        short = [{"instruction": "Q", "response": "A"}] * rows
        hub(patch, table("parquet", tmp_path / "short.parquet", short))
        heal("lamini")


# ----------------------------------------------------------------------------------- self


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short conversations, in the model's own type."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(talks, "_ROWS", 24)
    monkeypatch.setattr(talks, "_LONGEST", 40)
    monkeypatch.setattr(talks, "_LONGEST_QUESTION", 9)


def chat_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


class Recorder:
    """A model that passes on, and keeps the tokens it is given."""

    def __init__(self, model: Any) -> None:
        self.model, self.fed = model, []

    def __call__(self, ids: torch.Tensor, **options: Any) -> Any:
        self.fed.append(ids[:, 0].tolist())
        return self.model(ids, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def conversations(tokens: int = 200, seed: int = 0, **options: Any) -> list[Any]:
    options = {"model": tiny_model(), "tokenizer": chat_tokenizer(), **options}
    return talks.sampled_conversations(tokens=tokens, seed=seed, **options)[1]


def test_conversations_go_through_the_models_own_template(short, monkeypatch):
    monkeypatch.setattr(talks, "_FEWER", 0)  # rows stay to the end, so that they can be followed
    monkeypatch.setattr(talks, "for_sampling", nullcontext)
    tokenizer, recorder = chat_tokenizer(), Recorder(tiny_model())
    said = conversations(model=recorder, tokenizer=tokenizer)
    fed = list(zip(*recorder.fed, strict=True))
    texts = [tokenizer.decode(list(ids)) for ids in fed]
    assert len(said) > 12
    for one in said:
        question, answer = one
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert "~" not in question["content"] + answer["content"]
        whole = f"[user]{question['content']}~[assistant]{answer['content']}"
        # The last token of a row that is too long is drawn, but not fed any more.
        fed_of_it = whole[:-1] if answer.get("unfinished") else whole
        assert any(text.startswith(fed_of_it) for text in texts)
        assert len(question["content"]) <= 9
    assert {bool(one[-1].get("unfinished")) for one in said} == {True, False}


def test_what_is_sampled_is_distributed_as_the_model_says(short, monkeypatch):
    """The first token of the question, over many conversations."""
    monkeypatch.setattr(talks, "_ROWS", 3000)
    monkeypatch.setattr(talks, "_LONGEST", 9)
    model, tokenizer = tiny_model(), chat_tokenizer()
    before = tokenizer("[user]", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        truth = model(torch.tensor([before])).logits[0, -1].softmax(0)
    rows: list[Any] = [talks._Talk() for _ in range(3000)]
    frame = talks._frame(tokenizer, frozenset())
    assert frame is not None
    assert list(frame.before) == before
    talks._run(
        model,
        rows,
        [row.converse(frame) for row in rows],
        len(before) + 1,
        torch.Generator().manual_seed(0),
        lambda _: None,
    )
    stops = sorted(frame.stops)
    first = torch.tensor([row.question[0] if row.question else stops[0] for row in rows])
    share = torch.bincount(first, minlength=96) / 3000
    truth[stops[0]] = truth[stops].sum()
    truth[stops[1:]] = 0
    torch.testing.assert_close(share, truth, atol=0.03, rtol=0)


def test_conversations_come_from_the_seed_and_are_kept(short, monkeypatch, tmp_path):
    one = conversations()
    folder = tmp_path / "cache" / "llmslim" / "self"
    files = sorted(folder.iterdir())
    assert conversations(seed=1) != one
    assert conversations(model=tiny_model(seed=1)) != one
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-3])
    assert conversations() == one
    assert files[0].read_bytes() == whole

    real, sampled = talks._sample_batch, []
    monkeypatch.setattr(talks, "_sample_batch", lambda *a: (sampled.append(1), real(*a))[1])
    assert conversations() == one
    assert not sampled
    more = conversations(2000)
    assert more[: len(one)] == one  # a longer run begins with what is there
    assert sampled
    assert len(more) > len(one)


def test_rows_that_end_leave_without_a_trace(short, monkeypatch):
    """The same draws for the rows that stay: logits must not depend on who left."""
    monkeypatch.setattr(talks, "draw", lambda logits, *_: (logits.round(decimals=2) * 7).argmin(-1))
    left = conversations(cache=Path("/nonexistent"))
    monkeypatch.setattr(talks, "_FEWER", 0)
    assert conversations(cache=Path("/nonexistent")) == left


def test_healing_with_self(short):
    seen: list[tuple[int, int, str]] = []
    text = heal(
        "self",
        tokenizer=chat_tokenizer(),
        teacher=tiny_model(),
        tokens=400,
        length=32,
        loss_on="answers",
        progress=lambda *at: seen.append(at),
    )
    assert text.source == "self"
    assert text.licence == "self: the model's own, since the model wrote it"
    assert 350 < text.train.tokens < 460
    assert len(text.held_out)
    assert all("[user]" in one or len(one) < 32 for one in texts_in(text.train))
    assert not any("user" in one for one in texts_in(text.train, learned=True))
    sampling = [at for at in seen if at[2] == "sampling"]
    assert [at[0] for at in sampling] == sorted(at[0] for at in sampling)
    assert sampling[-1][0] <= sampling[-1][1]


def test_what_has_no_end_gives_its_weights_share(short, tmp_path):
    """The file alone would have a hundred times the tokens of what is sampled."""
    name = jsonl(tmp_path / "a.jsonl", [{"text": f"{i:09}"} for i in range(4000)])
    mixture = (HealSource(data=name, weight=3.0), "self")
    options = {"tokenizer": chat_tokenizer(), "teacher": tiny_model(), "tokens": 2000}
    text = heal(mixture, length=128, **options)
    found = texts_in(text.train)
    sampled = sum(len(one) for one in found if "[user]" in one)
    assert 500 <= sampled < 560
    assert 2000 <= text.train.tokens < 2060
    assert text.source == "a.jsonl, self"
    places = [i for i, one in enumerate(found) if "[user]" in one]
    assert places[-1] - places[0] > len(found) // 3  # the two are mixed


def test_self_without_tokens_or_template(short, monkeypatch):
    monkeypatch.setattr("llmslim.data.healing._SELF_TOKENS", 300)
    text = heal("self", teacher=tiny_model("gpt2"))
    assert text.notes[0] == "self: 300 tokens were sampled, since `tokens` is not given."
    assert text.train.tokens > 250
    assert not any("[user]" in one for one in everything(text))


def test_a_model_that_says_nothing_is_an_error(short):
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(96))
    said = problem("self", tokenizer=chat_tokenizer(), teacher=model, tokens=100)
    assert "ends every conversation before it says anything" in said
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    said = problem("self", tokenizer=chat_tokenizer(), teacher=model, tokens=100)
    assert "data: self, but the model's logits are not finite" in said
