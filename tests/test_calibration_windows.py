"""Calibration text as windows of token ids, some of them held out."""

from __future__ import annotations

import pytest
import torch
from helpers_checkpoint import tiny_tokenizer
from helpers_data import alone as alone
from helpers_data import (
    ids_of,
    jsonl,
    plain_tokenizer,
    put,
    rows_of,
    spec,
    with_start,
)
from tiny import tiny_model

from llmslim.conversion.calibrate import calibration_spec, with_overrides
from llmslim.data import calibration_windows, longest_input
from llmslim.data.windows import OWN_TEXT
from llmslim.errors import DataError
from llmslim.recipe import Recipe, shipped_recipes

EOS = 1


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


def test_a_short_text_among_several_is_noted(tmp_path):
    names = [put(tmp_path / "a.txt", b"a" * 4000), put(tmp_path / "b.txt", b"b" * 24)]
    windows = calibration_windows(spec(names, tokens=8 * 64), plain_tokenizer())
    assert windows.notes == ("b.txt: only 24 tokens (3 windows of 8); 256 were wanted.",)
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


def test_the_stretch_held_out_may_be_anywhere_in_the_text(tmp_path):
    numbers = "".join(f"{n:08}" for n in range(100))
    name = put(tmp_path / "a.txt", numbers.encode())
    starts = set()
    for seed in range(12):
        windows = calibration_windows(spec(name, tokens=8 * 32, seed=seed), plain_tokenizer())
        place = {tuple(ids_of(f"{n:08}")): n for n in range(100)}
        starts.add(place[tuple(windows.held_out[0].tolist())])
    assert len(starts) > 6
    assert max(starts) > 50


def test_the_end_token_separates_documents(tmp_path):
    name = jsonl(tmp_path / "a.jsonl", [{"text": "aaa"}, {"text": "bbb"}])
    windows = calibration_windows(spec(name, sequence_length=3), plain_tokenizer())
    (a,), (b,) = ids_of("a"), ids_of("b")
    got = rows_of(windows.ids, windows.held_out)
    # Seven tokens, three a window: aaa</s>bb or bbb</s>aa, whichever comes first.
    assert got in (sorted([(a, a, a), (EOS, b, b)]), sorted([(b, b, b), (EOS, a, a)]))
    assert windows.notes == ("a.jsonl: only 6 tokens (2 windows of 3); 66 were wanted.",)


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


def test_every_window_begins_as_the_tokenizer_begins_a_text(tmp_path):
    text = "".join(chr(33 + i % 60) for i in range(70))
    tokenizer = with_start(plain_tokenizer())
    assert tokenizer("ab")["input_ids"][0] == 0
    windows = calibration_windows(spec(put(tmp_path / "a.txt", text.encode())), tokenizer)
    stream = ids_of(text)
    cut = {(0, *stream[i : i + 7]) for i in range(0, 70, 7)}
    assert set(rows_of(windows.ids, windows.held_out)) <= cut


def test_too_little_text_is_an_error_with_the_count(tmp_path):
    with pytest.raises(DataError, match=r"a\.txt: 15 .* 8 .* 16\."):
        calibration_windows(spec(put(tmp_path / "a.txt", b"a" * 15)), plain_tokenizer())
    with pytest.raises(DataError, match=r"a\.txt: 0 .* 8 .* 16\."):
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
    error = rf"^calibration\.sequence_length: {longest + 1}; .* {longest} "
    with pytest.raises(DataError, match=error):
        calibration_windows(spec("self", sequence_length=longest + 1), None, model)


def test_a_model_may_set_no_limit():
    assert longest_input(tiny_model("llama")) == 2048
    model = tiny_model("llama")
    for no_limit in (0, -1):
        model.config.max_position_embeddings = no_limit
        assert longest_input(model) is None


def test_requests_that_make_no_sense_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"^calibration\.sequence_length: 1; .* 2 "):
        calibration_windows(spec("self", sequence_length=1), None)
    with pytest.raises(DataError, match=r"^calibration\.data: self"):
        calibration_windows(spec("self"), None)
    with pytest.raises(DataError, match=r"^calibration\.data: .*a\.txt"):
        calibration_windows(spec(put(tmp_path / "a.txt", b"a" * 99)), None)
    with pytest.raises(DataError, match=r"^gone\.txt: "):  # before anything is sampled
        calibration_windows(spec(["self", "gone.txt"]), plain_tokenizer())
    with pytest.raises(DataError, match=r"^calibration\.data: self "):
        calibration_windows(spec(["self", "a.txt", "self"]), plain_tokenizer(), tiny_model())


@pytest.mark.parametrize("data", ["text", "self"])
def test_progress_ends_at_the_whole(tmp_path, data):
    model = tiny_model() if data == "self" else None
    data = data if model else put(tmp_path / "a.txt", b"a" * 4000)
    seen: list[tuple[int, int, str]] = []
    calibration_windows(spec(data), plain_tokenizer(), model, progress=lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1]
    assert [at[0] for at in seen] == sorted(at[0] for at in seen)


def test_windows_are_as_long_as_a_small_model_reads_unless_a_length_is_set():
    model = tiny_model("gpt2", num_hidden_layers=1)
    assert longest_input(model) == 64

    def length(**section):
        recipe = Recipe.of({"calibration": section} if section else {})
        return calibration_spec(recipe, model, (), None).sequence_length

    assert (length(), length(tokens=99), length(sequence_length=80)) == (64, 64, 80)
    for name in shipped_recipes():
        assert calibration_spec(Recipe.load(name), model, (), None).sequence_length <= 64, name


def test_naming_text_means_fitting_to_it():
    recipe = Recipe.of({"calibration": {"data": "a.txt", "seed": 3}})
    assert with_overrides(recipe, None, (), None) == (recipe, None)
    found, init = with_overrides(recipe, None, ["b.txt"], 5)
    assert found.calibration is not None
    assert found.calibration.model_dump(include={"texts", "data", "tokens", "seed"}) == {
        "data": ("b.txt",),
        "tokens": 5,
        "seed": 3,
    }
    assert init == "least_squares"
    assert with_overrides(recipe, "random", (), 5)[1] == "random"
