"""Text for healing on disk, and the errors where it cannot be had."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any

import pytest
from helpers_checkpoint import tiny_tokenizer
from helpers_data import alone as alone
from helpers_data import jsonl, put, table
from helpers_healing_data import (
    everything,
    forbid,
    heal,
    heal_lamini_of,
    pairs,
    problem,
    tagged_tokenizer,
    texts_in,
    write_csv,
)

from llmslim.data import healing_text, tokens
from llmslim.errors import DataError
from llmslim.recipe.schema import Heal, HealSource

# --------------------------------------------------------------------------------- cache


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

    monkeypatch.setattr(tokens, "_finish", full)
    cache = tmp_path / "ids"
    error = problem(jsonl(tmp_path / "a.jsonl", pairs()), cache=cache)
    assert error.startswith(f"{cache}: no space left")
    assert "XDG_CACHE_HOME" in error
    assert not list(cache.iterdir())


def test_without_a_writable_cache_files_go_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "passing"))
    (tmp_path / "passing").mkdir()
    (tmp_path / "file").write_text("")
    text = heal(jsonl(tmp_path / "a.jsonl", pairs()), cache=tmp_path / "file")
    assert len(list((tmp_path / "passing").iterdir())) == 1
    assert len(everything(text)) == 60
    del text
    assert not list((tmp_path / "passing").iterdir())


# -------------------------------------------------------------------------------- errors


def test_an_error_names_the_columns_of_the_data(tmp_path):
    name = jsonl(tmp_path / "a.jsonl", [{"goal": "x", "sol1": "y"}])
    assert "a.jsonl:1: has the columns goal, sol1; one of text" in problem(name)
    wrong = HealSource(data=name, fields={"prompt": "goal", "answer": "sol3"})
    assert "a.jsonl:1: fields names sol3; the columns are goal, sol1." in problem(wrong)
    wrong = HealSource(data=name, fields={"prompt": "goal"})
    error = problem(wrong)
    assert "fields has prompt; allowed are text; messages (and perhaps system, tools);" in error
    assert "prompt, answer (and perhaps system, tools, context, reasoning)" in error
    parquet = table("parquet", tmp_path / "a.parquet", [{"goal": "x"}])
    wrong = HealSource(data=parquet, fields={"text": "body"})
    assert "a.parquet: row 1: fields names body; the columns are goal." in problem(wrong)


@pytest.mark.parametrize("tokens", [None, 100])
def test_nothing_to_train_on_is_an_error(tmp_path, tokens):
    name = put(tmp_path / "a.jsonl", b"\n \n")
    assert problem(name, tokens=tokens).startswith("a.jsonl: no rows; text to train on is needed")
    name = jsonl(tmp_path / "b.jsonl", [{"text": ""}, {"text": None}])
    error = problem(name, tokens=tokens)
    assert error.startswith("b.jsonl: no text is left. b.jsonl: 2 rows hold no text")
    assert error.count("2 rows") == 1
    name = jsonl(tmp_path / "c.jsonl", [{"prompt": "Who?", "completion": "I cannot say."}] * 3)
    error = problem(HealSource(data=name, filter="refusals"), tokens=tokens)
    assert error.startswith("c.jsonl: no text is left. c.jsonl: 3 rows hold a refusal")
    for name in (put(tmp_path / "d.txt", b" \n"), put(tmp_path / "d.csv", b"")):
        assert "no rows" in problem(name, tokens=tokens)


def test_a_csv_without_a_header_is_an_error(tmp_path):
    name = put(tmp_path / "a.csv", b"What is it?,A cat.\nAnd that?,A dog.\n")
    error = problem(name)
    assert "a.csv:2 (columns named by line 1): has the columns What is it?, A cat.; one of" in error
    name = put(tmp_path / "b.csv", b"prompt,completion\nA,B\nA,B,C\n")
    assert "b.csv:3: 3 fields; the first line names 2 columns, prompt, completion." in problem(name)
    name = put(tmp_path / "c.csv", b'prompt,completion\nA,"B\n')
    assert "c.csv:2: not CSV (" in problem(name)
    assert "is not UTF-8" in problem(put(tmp_path / "d.csv", b"text\n\xfc\n"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.parquet", "a.parquet.gz"])
def test_files_cut_short_are_errors_and_nothing_is_kept(tmp_path, name):
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


def test_requests_that_make_no_sense_are_errors(tmp_path):
    name = jsonl(tmp_path / "a.jsonl", pairs())
    assert "heal.held_out: 60; a.jsonl has 60 rows" in problem(name, held_out=60)
    assert "a row needs 2 tokens or more" in problem(name, length=1)
    assert "sampled from the dense model; there is none here" in problem("self")
    assert problem(str(tmp_path / "absent.jsonl")).endswith("no such file. Check the path.")
    assert "no data set of the hub could be read" in problem("nobody/nothing")
    with pytest.raises(DataError, match=r"^heal: .* tokenizer "):
        healing_text(Heal(data=name), None, context_length=8)
    with pytest.raises(DataError, match=r"^heal\.held_out: 5000; lamini .* 61 "):
        heal_lamini_of(tmp_path, 61)
