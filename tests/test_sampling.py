"""Text sampled from the model itself."""

from __future__ import annotations

from typing import Any

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
from tiny import ARCHITECTURES, logits, tiny_model

from llmslim.data import calibration_windows, sampling
from llmslim.data.windows import OWN_TEXT
from llmslim.errors import DataError


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample in the model's own type, whatever the machine."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")


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
    monkeypatch.setattr(sampling, "keep", lambda *_: None)
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
