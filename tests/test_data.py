"""Calibration text: every kind of file, windows, and text sampled from the model itself."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch
from helpers_checkpoint import tiny_tokenizer
from pyarrow import parquet
from tiny import ARCHITECTURES, logits, tiny_model

from llmslim.data import calibration_windows, longest_input, read_texts, sampling
from llmslim.data.windows import OWN_TEXT
from llmslim.errors import DataError
from llmslim.recipe.schema import Calibration

TEXTS = ["One fish.", "Two\nfish.", "Red fish, blue fish — ünï."]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and a cache folder of the test's own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def put(path: Path, data: bytes) -> str:
    """Write bytes, packed if the name says so."""
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def jsonl(path: Path, rows: list[Any]) -> str:
    return put(path, "\n".join(json.dumps(row) for row in rows).encode())


def parquet_bytes(rows: list[dict[str, Any]], **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue().to_pybytes()


def table(kind: str, path: Path, rows: list[dict[str, Any]]) -> str:
    return jsonl(path, rows) if kind == "jsonl" else put(path, parquet_bytes(rows))


def message(**problem: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(read_texts(**problem))
    return str(caught.value)


# ------------------------------------------------------------------------------- reading


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
    monkeypatch.setattr("llmslim.data.text._BUFFER_ROWS", 5)
    rows = [{"text": f"t{i}"} for i in range(50)]
    read = list(read_texts(jsonl(tmp_path / "a.jsonl", rows)))
    assert sorted(read) == sorted(row["text"] for row in rows)
    assert read != [row["text"] for row in rows]


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
    said = message(name_or_path=name)
    assert f"a.{kind}" in said
    assert "has the columns goal, sol1; one of text, content" in said
    assert "instruction+response" in said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": 3}, "text holds a int"),
        ({"messages": "hi"}, "messages holds a str"),
        ({"messages": [{"name": "x"}]}, "keys name; role and content are needed"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages holds a list"),
        ([1], "list; every line is one JSON object"),
    ],
)
def test_rows_of_other_things_are_named_with_their_line(tmp_path, row, said):
    name = jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, row])
    assert message(name_or_path=name).startswith(f"{name}:2: ")
    assert said in message(name_or_path=name)


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
        said = message(name_or_path=name)
        assert said.startswith(f"{name}: not a local file, and no data set of the hub")
        assert "\n" not in said


def test_a_name_on_the_hub_says_which_part(tmp_path, monkeypatch):
    local = table("parquet", tmp_path / "a.parquet", [{"instruction": "Q", "response": "A"}])
    load, asked = datasets.load_dataset, []

    def stand_in(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, config, split))
        return load("parquet", data_files={split: local}, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    for name in ("org/name", "name:config", "org/name:config:test", "name::test[:10]", "lamini"):
        assert list(read_texts(name, seed=-1)) == [[ASK, ANSWER]]
    assert asked == [
        ("org/name", None, "train"),
        ("name", "config", "train"),
        ("org/name", "config", "test"),
        ("name", None, "test[:10]"),
        ("MBZUAI/LaMini-instruction", None, "train"),
    ]


# ------------------------------------------------------------------------------- windows

EOS = 1


def plain_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def spec(data: str | list[str], **changes: Any) -> Calibration:
    return Calibration(**{"data": data, "tokens": 64, "sequence_length": 8, **changes})


def ids_of(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def rows_of(*tensors: torch.Tensor) -> list[tuple[int, ...]]:
    return sorted(tuple(row) for ids in tensors for row in ids.tolist())


def test_windows_are_the_text_cut_and_each_is_used_once(tmp_path):
    text = "".join(chr(33 + i % 60) for i in range(83))
    windows = calibration_windows(spec(put(tmp_path / "a.txt", text.encode())), plain_tokenizer())
    stream = ids_of(text)
    cut = sorted(tuple(stream[i : i + 8]) for i in range(0, 80, 8))
    assert windows.ids.shape == (7, 8)
    assert windows.held_out.shape == (1, 8)
    assert windows.ids.dtype == windows.held_out.dtype == torch.int64
    got = rows_of(windows.ids, windows.held_out)
    assert len(got) == 8
    assert set(got) <= set(cut)
    assert len(set(got)) == 8
    assert (windows.source, windows.notes) == ("a.txt", ())


def test_windows_come_from_the_seed(tmp_path):
    name = put(tmp_path / "a.txt", "".join(chr(33 + i * i % 89) for i in range(400)).encode())
    one, again, other = (
        calibration_windows(spec(name, seed=seed), plain_tokenizer()) for seed in (5, 5, 6)
    )
    assert torch.equal(one.ids, again.ids)
    assert torch.equal(one.held_out, again.held_out)
    assert rows_of(one.ids) != rows_of(other.ids)


def test_several_texts_give_as_many_windows_each_in_one_order(tmp_path):
    names = [put(tmp_path / "a.txt", b"a" * 4000), put(tmp_path / "b.txt", b"b" * 4000)]
    windows = calibration_windows(spec(names, tokens=8 * 64), plain_tokenizer())
    assert (windows.source, windows.notes) == ("a.txt, b.txt", ())
    (a,), (b,) = ids_of("a"), ids_of("b")
    for ids, each in ((windows.ids, 30), (windows.held_out, 2)):
        assert sorted(ids[:, 0].tolist()) == sorted([a] * each + [b] * each)
        assert torch.equal(ids, ids[:, :1].expand(-1, 8))
    # Whoever takes a few windows only finds both: unshuffled, all of a come first.
    assert {a, b} == set(windows.ids[:15, 0].tolist())
    again = calibration_windows(spec(names, tokens=8 * 64), plain_tokenizer())
    assert torch.equal(windows.ids, again.ids)


def test_a_short_text_among_several_is_told_of(tmp_path):
    names = [put(tmp_path / "a.txt", b"a" * 4000), put(tmp_path / "b.txt", b"b" * 24)]
    windows = calibration_windows(spec(names, tokens=8 * 64), plain_tokenizer())
    assert windows.notes == ("b.txt: only 24 tokens (3 windows of 8); 256 were asked for.",)
    assert (len(windows.ids), len(windows.held_out)) == (30 + 2, 2 + 1)


def test_text_of_the_models_own_beside_a_file(tmp_path):
    model = tiny_model()
    name = put(tmp_path / "a.txt", b"a" * 4000)
    both = calibration_windows(spec([name, "self"], tokens=64), plain_tokenizer(), model)
    own = calibration_windows(spec("self", tokens=32), plain_tokenizer(), model)
    assert both.source == f"a.txt, {OWN_TEXT}"
    written = set(rows_of(own.ids, own.held_out))
    assert len(written & set(rows_of(both.ids, both.held_out))) == len(written) == 4


@pytest.mark.parametrize(("tokens", "aside"), [(8, 1), (160, 1), (8 * 40, 2), (8 * 1000, 16)])
def test_a_sixteenth_is_held_out(tmp_path, tokens, aside):
    name = put(tmp_path / "a.txt", b"abcd" * 4000)
    windows = calibration_windows(spec(name, tokens=tokens), plain_tokenizer())
    assert len(windows.held_out) == aside
    assert len(windows.ids) == max(2, tokens // 8) - aside


def test_the_held_out_windows_are_one_stretch_that_no_other_window_is_of(tmp_path):
    numbers = "".join(f"{n:08}" for n in range(400))  # every window another one
    name = put(tmp_path / "a.txt", numbers.encode())
    windows = calibration_windows(spec(name, tokens=8 * 100), plain_tokenizer())
    place = {tuple(ids_of(f"{n:08}")): n for n in range(400)}
    aside = [place[row] for row in map(tuple, windows.held_out.tolist())]
    assert aside == list(range(aside[0], aside[0] + 6))
    fitted = [place[row] for row in map(tuple, windows.ids.tolist())]
    assert len(set(fitted)) == 94
    assert not set(fitted) & set(aside)


def test_documents_are_parted_by_the_end_token(tmp_path):
    name = jsonl(tmp_path / "a.jsonl", [{"text": "aaa"}, {"text": "bbb"}])
    windows = calibration_windows(spec(name, sequence_length=3), plain_tokenizer())
    (a,), (b,) = ids_of("a"), ids_of("b")
    got = rows_of(windows.ids, windows.held_out)
    # Seven tokens, three a window: aaa</s>bb or bbb</s>aa, whichever comes first.
    assert got in (sorted([(a, a, a), (EOS, b, b)]), sorted([(b, b, b), (EOS, a, a)]))
    assert windows.notes == ("a.jsonl: only 6 tokens (2 windows of 3); 66 were asked for.",)


def test_roles_go_through_the_chat_template_or_are_joined(tmp_path):
    name = jsonl(tmp_path / "a.jsonl", [{"instruction": "Q" * 9, "response": "A" * 9}])
    for tokenizer, text in (
        (tiny_tokenizer(), f"<user>{'Q' * 9}<assistant>{'A' * 9}"),
        (plain_tokenizer(), f"{'Q' * 9}\n\n{'A' * 9}"),
    ):
        windows = calibration_windows(spec(name, sequence_length=5), tokenizer)
        stream = ids_of(text)
        cut = [tuple(stream[i : i + 5]) for i in range(0, len(stream) // 5 * 5, 5)]
        assert rows_of(windows.ids, windows.held_out) == sorted(cut)


def test_a_turn_that_ends_itself_gets_no_second_end(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}</s>"
    rows = [{"prompt": "a", "completion": "b"}] * 4
    windows = calibration_windows(
        spec(jsonl(tmp_path / "a.jsonl", rows), sequence_length=3), tokenizer
    )
    assert rows_of(windows.ids, windows.held_out) == [(*ids_of("ab"), EOS)] * 4


def test_a_conversation_that_the_template_refuses_is_noted(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    name = jsonl(tmp_path / "a.jsonl", [{"prompt": "a" * 9, "completion": "b" * 9}])
    windows = calibration_windows(spec(name), tokenizer)
    assert "refuses 1 conversations" in windows.notes[0]


def with_start(tokenizer: Any) -> Any:
    """Make a tokenizer put its padding token, as a start, before every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<pad>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 0)]
    )
    return tokenizer


def test_every_window_begins_as_the_tokenizer_begins_a_text(tmp_path):
    text = "".join(chr(33 + i % 60) for i in range(70))
    tokenizer = with_start(plain_tokenizer())
    assert tokenizer("ab")["input_ids"][0] == 0
    windows = calibration_windows(spec(put(tmp_path / "a.txt", text.encode())), tokenizer)
    stream = ids_of(text)
    cut = {(0, *stream[i : i + 7]) for i in range(0, 70, 7)}
    assert set(rows_of(windows.ids, windows.held_out)) <= cut


def test_too_little_text_is_an_error_with_the_count(tmp_path):
    with pytest.raises(DataError, match=r"15 tokens; two windows of 8 need 16\. Give more text"):
        calibration_windows(spec(put(tmp_path / "a.txt", b"a" * 15)), plain_tokenizer())
    with pytest.raises(DataError, match="0 tokens"):
        calibration_windows(spec(put(tmp_path / "a.txt", b" \n")), plain_tokenizer())


def test_a_long_text_is_not_tokenised_as_a_whole(tmp_path, monkeypatch):
    tokenizer, seen = plain_tokenizer(), []
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda s, t, **k: (seen.append(len(t[0])), call(s, t, **k))[1]
    )
    calibration_windows(spec(put(tmp_path / "a.txt", b"abcd" * 10_000)), tokenizer)
    assert max(seen) == 64 * 4 * 8


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_windows_longer_than_the_model_reads_are_an_error(tmp_path, architecture):
    model = tiny_model(architecture)
    longest = model.config.max_position_embeddings
    said = rf"sequence_length: {longest + 1}; the model reads at most {longest} tokens"
    with pytest.raises(DataError, match=said):
        calibration_windows(spec("self", sequence_length=longest + 1), None, model)


def test_a_model_may_set_no_limit():
    assert longest_input(tiny_model("llama")) == 2048
    model = tiny_model("llama")
    for no_limit in (0, -1):
        model.config.max_position_embeddings = no_limit
        assert longest_input(model) is None


def test_what_cannot_be_done_is_said(tmp_path):
    with pytest.raises(DataError, match="needs 2 tokens or more"):
        calibration_windows(spec("self", sequence_length=1), None)
    with pytest.raises(DataError, match="there is none here"):
        calibration_windows(spec("self"), None)
    with pytest.raises(DataError, match="no tokenizer"):
        calibration_windows(spec(put(tmp_path / "a.txt", b"a" * 99)), None)
    with pytest.raises(DataError, match=r"^gone\.txt: no such file"):  # before anything is sampled
        calibration_windows(spec(["self", "gone.txt"]), plain_tokenizer())
    with pytest.raises(DataError, match="self is named twice"):
        calibration_windows(spec(["self", "a.txt", "self"]), None)


@pytest.mark.parametrize("data", ["text", "self"])
def test_progress_ends_at_the_whole(tmp_path, data):
    model = tiny_model() if data == "self" else None
    data = data if model else put(tmp_path / "a.txt", b"a" * 4000)
    seen: list[tuple[int, int, str]] = []
    calibration_windows(spec(data), plain_tokenizer(), model, progress=lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1]
    assert [at[0] for at in seen] == sorted(at[0] for at in seen)


# ------------------------------------------------------------------------------ sampling


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample in the model's own type, whatever the machine."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampling_follows_the_model(architecture, exact):
    model = tiny_model(architecture)
    windows = calibration_windows(spec("self", sequence_length=16), plain_tokenizer(), model)
    ids = torch.cat([windows.ids, windows.held_out])
    assert ids.shape == (4, 16)
    assert not (ids[:, 0] < 2).any()  # the special tokens
    # The four after the first are the likeliest, by a pass over the whole sequence at once.
    assert torch.equal(logits(model, ids)[:, :4].argmax(-1), ids[:, 1:5])


def test_what_is_drawn_has_the_softmax_distribution():
    row = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    drawn = sampling.draw(row.repeat(20_000, 1), torch.zeros(20_000).bool(), generator)
    share = torch.bincount(drawn, minlength=5) / 20_000
    torch.testing.assert_close(share, row.softmax(0), atol=0.012, rtol=0)
    assert share[2] == 0


def test_self_comes_from_the_seed_and_half_is_conversation(exact, monkeypatch):
    monkeypatch.setattr(sampling, "_read", lambda *_: None)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.chat_template = "~{{ messages[0]['content'][:2] }}~"
    one, again, other = (
        calibration_windows(spec("self", tokens=160, seed=seed), tokenizer, model)
        for seed in (1, 1, 2)
    )
    assert torch.equal(one.ids, again.ids)
    assert rows_of(one.ids) != rows_of(other.ids)
    starts = {tuple(ids_of(f"~{opener[:2]}~")) for opener in sampling.OPENERS}
    chats = [row for row in rows_of(one.ids, one.held_out) if row[:4] in starts]
    assert len(chats) == 10
    assert one.source == OWN_TEXT


def test_long_windows_are_several_samples(exact, monkeypatch):
    monkeypatch.setattr(sampling, "_LONGEST", 6)
    ids = sampling.sampled_windows(tiny_model(), with_start(plain_tokenizer()), 3, 16, 0)
    assert ids.shape == (3, 16)
    assert (ids[:, [0, 6, 12]] == 0).all()  # each begins anew


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    model.model.layers[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    calibration_windows(spec("self"), None, model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_samples_are_kept_for_this_model_and_these_numbers(tmp_path, monkeypatch):
    model = tiny_model()
    one = calibration_windows(spec("self"), None, model)
    folder = tmp_path / "cache" / "llmslim" / "self"
    (file,) = folder.iterdir()
    real = sampling._sample

    def refuse(*_: Any) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(sampling, "_sample", refuse)
    again = calibration_windows(spec("self"), None, tiny_model())
    assert torch.equal(one.ids, again.ids)
    assert again.ids.dtype == torch.int64
    monkeypatch.setattr(sampling, "_sample", real)
    calibration_windows(spec("self", seed=1), None, model)
    calibration_windows(spec("self", tokens=80), None, model)
    calibration_windows(spec("self"), None, tiny_model(seed=1))
    calibration_windows(spec("self"), tiny_tokenizer(), model)
    assert len(list(folder.iterdir())) == 5

    whole = file.read_bytes()
    for damage in (b"", whole[:-3], b"something else"):
        file.write_bytes(damage)
        assert torch.equal(calibration_windows(spec("self"), None, model).ids, one.ids)
        assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(calibration_windows(spec("self"), None, tiny_model()).ids) == 7


def test_a_broken_model_is_an_error(exact):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(DataError, match="logits are not finite"):
        calibration_windows(spec("self"), None, model)


# ----------------------------------------------------------------------------- benchmarks
