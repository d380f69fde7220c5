"""Text that the dense model writes itself."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import tiny_tokenizer
from helpers_data import alone as alone
from helpers_data import jsonl
from helpers_healing_data import (
    CHATML,
    everything,
    heal,
    problem,
    texts_in,
)
from tiny import tiny_model

from llmslim.data import conversations as talks
from llmslim.data import healing, sampling
from llmslim.recipe.schema import HealSource


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short conversations, in the model's own type."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(talks, "ROWS", 24)
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
    monkeypatch.setattr(sampling, "_SHRINK_AT", 0)  # rows stay to the end, and can be followed
    monkeypatch.setattr(talks, "for_sampling", nullcontext)
    tokenizer, recorder = chat_tokenizer(), Recorder(tiny_model())
    found = conversations(model=recorder, tokenizer=tokenizer)
    fed = list(zip(*recorder.fed, strict=True))
    texts = [tokenizer.decode(list(ids)) for ids in fed]
    assert len(found) > 12
    for one in found:
        question, answer = one
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert "~" not in question["content"] + answer["content"]
        whole = f"[user]{question['content']}~[assistant]{answer['content']}"
        # The last token of a row that is too long is drawn, but not fed any more.
        fed_of_it = whole[:-1] if answer.get("unfinished") else whole
        assert any(text.startswith(fed_of_it) for text in texts)
        assert len(question["content"]) <= 9
    assert {bool(one[-1].get("unfinished")) for one in found} == {True, False}


def test_sampled_text_has_the_model_s_distribution(short, monkeypatch):
    """The first token of the question, over many conversations."""
    monkeypatch.setattr(talks, "ROWS", 3000)
    monkeypatch.setattr(talks, "_LONGEST", 9)
    model, tokenizer = tiny_model(), chat_tokenizer()
    before = tokenizer("[user]", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        truth = model(torch.tensor([before])).logits[0, -1].softmax(0)
    frame = talks._frame(tokenizer, frozenset())
    assert frame is not None
    assert list(frame.before) == before
    questions: list[list[int]] = [[] for _ in range(3000)]
    rows = [sampling.SampledRow(talks._converse(frame, one, [])) for one in questions]
    draws = torch.Generator().manual_seed(0)
    sampling.sample_rows(model, rows, len(before) + 1, draws, lambda _: None)
    stops = sorted(frame.stops)
    first = torch.tensor([one[0] if one else stops[0] for one in questions])
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
    monkeypatch.setattr(
        sampling, "draw", lambda logits, *_: (logits.round(decimals=2) * 7).argmin(-1)
    )
    left = conversations(cache=Path("/nonexistent"))
    monkeypatch.setattr(sampling, "_SHRINK_AT", 0)
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
    monkeypatch.setattr(healing, "_SELF_TOKENS", 300)
    text = heal("self", teacher=tiny_model("gpt2"))
    assert text.notes[0] == "self: 300 tokens were sampled, since `tokens` is not given."
    assert text.train.tokens > 250
    assert not any("[user]" in one for one in everything(text))


def test_a_model_that_writes_nothing_is_an_error(short):
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(96))
    error = problem("self", tokenizer=chat_tokenizer(), teacher=model, tokens=100)
    assert "ends every conversation at once" in error
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    error = problem("self", tokenizer=chat_tokenizer(), teacher=model, tokens=100)
    assert "data: self, but the model's logits are not finite" in error
