"""Text sampled from the model itself."""

from __future__ import annotations

from typing import Any

import every_architecture
import pytest
import torch
from helpers_checkpoint import tiny_tokenizer
from helpers_data import alone as alone
from helpers_data import (
    ids_of,
    plain_tokenizer,
    rows_of,
    spec,
    with_start,
)
from helpers_healing_data import CHATML
from tiny import ARCHITECTURES, logits, tiny_model

from llmslim.compat import attention_of
from llmslim.data import Windows, calibration_windows, sampling
from llmslim.data import conversations as talks
from llmslim.data.windows import OWN_TEXT
from llmslim.errors import DataError

CLASSES = every_architecture.config_classes()


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample in the model's own type, whatever the machine."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")


@pytest.fixture
def talking(exact: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short conversations: every window of 64 tokens has the beginning of one."""
    monkeypatch.setattr(talks, "ROWS", 8)
    monkeypatch.setattr(talks, "_LONGEST", 40)
    monkeypatch.setattr(talks, "_LONGEST_QUESTION", 9)


def chat_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def own(tokenizer: Any = None, model: Any = None, **changes: Any) -> Windows:
    """Return what a model writes: 16 windows of 64 tokens."""
    wanted = spec("self", **{"tokens": 1024, "sequence_length": 64, **changes})
    return calibration_windows(wanted, tokenizer or chat_tokenizer(), model or tiny_model())


def cut(
    tokenizer: Any, tokens: int, *, length: int = 64, start: bool = False
) -> list[tuple[int, ...]]:
    """Return the windows of sampled conversations, written by transformers and cut by hand."""
    stream: list[int] = []
    for one in talks.sampled_conversations(tiny_model(), tokenizer, tokens, 0)[1]:
        turns = [{key: turn[key] for key in ("role", "content")} for turn in one]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        if one[-1].get("unfinished") and turns[-1]["content"] in text:
            text = text.removesuffix("~")
        stream += [*ids_of(text), 1]  # the end token
    inner = length - start
    rows = [stream[i : i + inner] for i in range(0, len(stream) - inner, inner)]
    return [(0,) * start + tuple(row) for row in rows]


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


def test_self_comes_from_the_seed(talking, monkeypatch):
    monkeypatch.setattr(sampling, "keep", lambda *_: None)
    monkeypatch.setattr(talks, "keep", lambda *_: None)
    one, again, other = (own(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.ids, again.ids)
    assert torch.equal(one.held_out, again.held_out)
    mine, others = (set(rows_of(found.ids, found.held_out)) for found in (one, other))
    assert not mine & others


@pytest.mark.parametrize("start", [False, True])
def test_half_of_self_is_conversations_in_the_template(talking, start):
    model, tokenizer = tiny_model(), chat_tokenizer()
    tokenizer = with_start(tokenizer) if start else tokenizer
    found = own(tokenizer, tokens=2048, sequence_length=128)
    texts = [tokenizer.decode(row) for row in rows_of(found.ids, found.held_out)]
    assert len(texts) == 16
    assert sum("[user]" in text for text in texts) == 8
    questions = [one for text in texts for one in text.split("[user]")[1:-1]]
    assert len(questions) > 8
    assert len(set(questions)) == len(questions)
    # One window of each half is held out.
    assert sorted("[user]" in tokenizer.decode(row) for row in found.held_out) == [False, True]

    talked = cut(tokenizer, 1152, length=128, start=start)[:8]
    free = sampling.sampled_windows(model, tokenizer, 8, 128, 0)
    assert rows_of(found.ids, found.held_out) == sorted([*talked, *rows_of(free)])
    assert (found.source, found.notes) == (OWN_TEXT, ())


def test_more_is_sampled_where_the_template_writes_less_than_that(talking, monkeypatch):
    monkeypatch.setattr(talks, "_LONGEST", 70)
    tokenizer = chat_tokenizer()
    assert "m['content']" in CHATML
    tokenizer.chat_template = CHATML.replace("m['content']", "m['content'][:3]")
    found = own(tokenizer)
    assert len(cut(tokenizer, 576)) < 8  # what is sampled first is too little
    free = sampling.sampled_windows(tiny_model(), tokenizer, 8, 64, 0)
    expected = sorted([*cut(tokenizer, 1024)[:8], *rows_of(free)])
    assert rows_of(found.ids, found.held_out) == expected


def test_sampling_ends_where_the_template_writes_almost_nothing(talking, monkeypatch):
    monkeypatch.setattr(talks, "_LONGEST", 70)
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] if m['content']|length < 4 }}~"
        "{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    found = own(tokenizer)
    count = len(found.ids) + len(found.held_out)
    assert 8 + 2 <= count < 16
    short = f"only {(count - 8) * 64} tokens ({count - 8} windows of 64); 512 were wanted"
    assert any(short in note for note in found.notes)


@pytest.mark.parametrize("reason", ["silent", "refused", "unknown tag"])
def test_a_model_that_writes_no_conversations_writes_free_text(talking, reason):
    model, tokenizer = tiny_model(), chat_tokenizer()
    if reason == "silent":
        model.generation_config.eos_token_id = list(range(96))
    elif reason == "refused":
        tokenizer.chat_template = "{{ raise_exception('no') }}"
    else:
        tokenizer.add_tokens(["<new>"])  # the first one that the model has no embedding for
        tokenizer.chat_template += "{% if not add_generation_prompt %}<new>{% endif %}"
    found = own(tokenizer, model)
    free = sampling.sampled_windows(model, tokenizer, 16, 64, 0)
    assert rows_of(found.ids, found.held_out) == rows_of(free)
    (note,) = found.notes
    assert note.startswith(f"{OWN_TEXT}: free text alone")


@pytest.mark.parametrize("tokens", [1, 40, 48])
def test_little_text_is_free_text(talking, tokens):
    """Half of three windows would leave nothing to fit to beside what is held out."""
    found = own(tokens=tokens, sequence_length=16)
    free = sampling.sampled_windows(tiny_model(), chat_tokenizer(), 2 if tokens == 1 else 3, 16, 0)
    assert rows_of(found.ids, found.held_out) == rows_of(free)
    assert found.notes == ()


def test_without_a_template_all_is_free_text(exact):
    tokenizer = plain_tokenizer()
    found = own(tokenizer)
    free = sampling.sampled_windows(tiny_model(), tokenizer, 16, 64, 0)
    assert rows_of(found.ids, found.held_out) == rows_of(free)
    assert (found.source, found.notes) == (OWN_TEXT, ())


def test_long_windows_are_several_samples(exact, monkeypatch):
    monkeypatch.setattr(sampling, "_LONGEST", 6)
    ids = sampling.sampled_windows(tiny_model(), with_start(plain_tokenizer()), 3, 16, 0)
    assert ids.shape == (3, 16)
    assert (ids[:, [0, 6, 12]] == 0).all()  # the start of each


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
    real = sampling.sample_rows

    def refuse(*_: Any) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(sampling, "sample_rows", refuse)
    again = calibration_windows(spec("self"), None, tiny_model())
    assert torch.equal(one.ids, again.ids)
    assert again.ids.dtype == torch.int64
    monkeypatch.setattr(sampling, "sample_rows", real)
    calibration_windows(spec("self", seed=1), None, model)
    calibration_windows(spec("self", tokens=80), None, model)
    calibration_windows(spec("self"), None, tiny_model(seed=1))
    calibration_windows(spec("self"), plain_tokenizer(), model)
    assert len(list(folder.iterdir())) == 5

    whole = file.read_bytes()
    for damage in (b"", whole[:-3], b"something else"):
        file.write_bytes(damage)
        assert torch.equal(calibration_windows(spec("self"), None, model).ids, one.ids)
        assert file.read_bytes() == whole


def test_conversations_are_kept_for_this_template(talking, tmp_path, monkeypatch):
    one = own()
    folder = tmp_path / "cache" / "llmslim" / "self"
    talked = set(folder.glob("*.jsonl"))
    other = chat_tokenizer()
    other.chat_template = CHATML.replace("[{{", "<{{")
    assert rows_of(own(other).ids) != rows_of(one.ids)
    assert set(folder.glob("*.jsonl")) > talked
    assert len(list(folder.glob("*.safetensors"))) == 1  # free text has no template

    def refuse(*_: Any) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(sampling, "sample_rows", refuse)
    monkeypatch.setattr(talks, "sample_rows", refuse)
    assert torch.equal(own().ids, one.ids)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(calibration_windows(spec("self"), None, tiny_model()).ids) == 7


def test_a_broken_model_is_an_error(exact):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(DataError, match="data: self, "):
        calibration_windows(spec("self"), None, model)


def test_the_first_token_is_not_drawn_by_a_0_where_it_is_impossible(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *sizes, generator: torch.zeros(sizes))
    logits = torch.tensor([[-torch.inf, -torch.inf, 0.0, 0.0], [0.0, -torch.inf, 0.0, 0.0]])
    drawn = sampling.draw(logits, torch.zeros(2).bool(), torch.Generator())
    assert drawn.tolist() == [2, 0]


def test_no_text_opens_with_a_special_token():
    tokenizer = tiny_tokenizer()
    draws = torch.Generator().manual_seed(0)
    prompts = sampling.opening_prompts(tiny_model(num_hidden_layers=1), tokenizer, 500, draws)
    found = {ids[0] for ids, _ in prompts}
    assert len(found) > 80
    assert not found & set(tokenizer.all_special_ids)


@pytest.mark.parametrize(
    "name", ["mistral", "gpt_oss", "inkling_text", "deepseek_v3", "falcon", "gemma2", "mixtral"]
)
def test_a_copy_for_one_token_at_a_time_predicts_what_the_model_does(name, exact):
    """Heads in groups, with sinks, with a bias for each head, without groups, and old code."""
    model = every_architecture.tiny_model(CLASSES[name])
    ids = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(1))
    cache, found = None, []
    with torch.inference_mode(), sampling.for_sampling(model) as sampler:
        for position in range(10):
            step = ids[:, position : position + 1]
            output = sampler(step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits[:, -1])
        assert sampler.config is not model.config
        weights = zip(sampler.parameters(), model.parameters(), strict=True)
        assert all(one is other for one, other in weights)
    torch.testing.assert_close(torch.stack(found, 1), every_architecture.logits(model))
    groups = [getattr(module, "num_key_value_groups", 1) for module in sampler.modules()]
    made_for_it = attention_of(sampler.config) == "llmslim_one_query"
    assert made_for_it == (max(groups) > 1) == (name not in {"falcon", "deepseek_v3"})
