"""Tokenizers that are larger than the embedding, and seeds of any size; dry runs tell of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import tiny_tokenizer
from helpers_cli import ok, run
from helpers_data import alone as alone
from helpers_data import jsonl, put, spec
from helpers_healing_data import CHATML
from tiny import tiny_model

from llmslim import heal, plan_heal, slim
from llmslim.data import calibration_windows, embedding_rows, healing_text
from llmslim.data.conversations import sampled_conversations
from llmslim.data.vocabulary import check_ids
from llmslim.errors import DataError
from llmslim.recipe.schema import Heal

SETTINGS = {"context_length": 16, "batch_size": 4, "tokens": 64, "precision": "fp32"}


def larger(*added: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.add_tokens(list(added))
    return tokenizer


def text(tmp_path: Path, *, known: bool) -> str:
    texts = [f"row{i:03}" + ("" if known or i != 30 else "<new>") for i in range(60)]
    return jsonl(tmp_path / "a.jsonl", [{"text": one} for one in texts])


def named(caught: Any) -> None:
    (error,) = caught.value.problems
    assert "'<new>' with id 96" in error
    assert "96 rows" in error


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_a_token_without_an_embedding_is_named_before_anything_is_trained(tmp_path, architecture):
    model = tiny_model(architecture)
    assert embedding_rows(model) == 96
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(DataError) as caught:
        heal(model, data=text(tmp_path, known=False), tokenizer=larger("<new>"), settings=SETTINGS)
    named(caught)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_a_tokenizer_that_is_only_larger_keeps_working(tmp_path):
    name = text(tmp_path, known=True)
    tokenizer = larger("<new>")
    tokenizer.pad_token = "<new>"
    tokenizer.chat_template = CHATML.replace("[assistant]", "<new>")  # for the answers shown
    report = heal(tiny_model(), data=name, tokenizer=tokenizer, train="all", settings=SETTINGS)
    assert report.steps > 0
    assert {answer.before for answer in report.answers} == {""}
    windows = calibration_windows(spec(name), tokenizer, tiny_model())
    assert int(windows.ids.max()) < 96


def test_rows_already_made_are_checked_too(tmp_path):
    data = text(tmp_path, known=False)
    rows = healing_text(Heal(data=data), larger("<new>"), context_length=16)
    with pytest.raises(DataError) as caught:
        heal(tiny_model(), data=rows, tokenizer=larger("<new>"), settings=SETTINGS)
    named(caught)


def test_calibration_text_names_the_token(tmp_path):
    name = put(tmp_path / "a.txt", b"some text <new> and more " * 40)
    with pytest.raises(DataError) as caught:
        calibration_windows(spec(name), larger("<new>"), tiny_model())
    named(caught)


def test_windows_made_elsewhere_are_checked_too(tmp_path):
    name = put(tmp_path / "a.txt", b"some text <new> and more " * 40)
    windows = calibration_windows(spec(name), larger("<new>"))
    rule = {"match": "*.mlp.*", "structure": "low_rank", "rank": 4}
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for given, error in ((windows, r"\b96\b"), (windows.ids, "Tensor")):
        with pytest.raises(DataError, match=error):
            slim(model, {"replace": [rule], "init": "least_squares"}, calibration=given)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_a_model_cannot_converse_in_tags_that_it_does_not_know():
    tokenizer = larger("<new>")
    tokenizer.chat_template = CHATML.replace("[assistant]", "<new>")
    with pytest.raises(DataError) as caught:
        sampled_conversations(tiny_model(), tokenizer, 64, 0)
    assert "'<new>' with id 96" in str(caught.value)


def test_dry_runs_and_runs_name_the_token(tmp_path):
    model, recipe = tmp_path / "model", tmp_path / "r.yaml"
    tiny_model().save_pretrained(model)
    larger("<new>").save_pretrained(model)
    recipe.write_text(
        "name: r\nreplace:\n  - match: '*.mlp.*'\n    structure: low_rank\n    rank: 4\n"
        "calibration:\n  sequence_length: 16\n"
    )
    name = text(tmp_path, known=False)
    out = tmp_path / "out"
    convert = ("convert", model, "-r", recipe, "-o", out, "--calibration", name)
    convert += ("--calibration-tokens", "400")
    healing = ("heal", model, "--data", name, "-o", out, "--context-length", "16")
    for command in (convert, healing):
        for dry in ((), ("--dry-run",)):
            result = run(*command, *dry)
            assert result.exit_code == 1
            assert "'<new>' with id 96" in result.output
            assert not out.exists()
    text(tmp_path, known=True)
    assert "nothing was written" in ok(*convert, "--dry-run")
    assert "nothing was trained" in ok(*healing, "--dry-run")


def test_seeds_of_any_size(tmp_path):
    data = jsonl(tmp_path / "a.jsonl", [{"text": f"row{i:03}"} for i in range(60)])
    reports = [
        heal(
            tiny_model(), data=data, tokenizer=tiny_tokenizer(), train="all", settings=SETTINGS,
            seed=one,
        )
        for one in (2**63 - 1, 2**63 - 1, 2**32)
    ]  # fmt: skip
    losses = [[line.get("loss") for line in report.history] for report in reports]
    assert losses[0] == losses[1] != losses[2]
    assert reports[0].settings["seed"] == 2**63 - 1


def test_a_dry_run_counts_rows_that_are_left_out(tmp_path):
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    rows = [{"prompt": f"Q{i}", "completion": "A" if i else "", "topic": "x"} for i in range(40)]
    plan = plan_heal(model, data=jsonl(tmp_path / "a.jsonl", rows), settings=SETTINGS)
    assert any(note.startswith("a.jsonl: 1 rows hold a question") for note in plan.notes)
    assert any("the columns topic (39)" in note for note in plan.notes)


def test_every_token_is_held_against_the_smaller_of_both_tables() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    assert embedding_rows(model) == 96
    model.lm_head = torch.nn.Linear(48, 90, bias=False)
    assert embedding_rows(model) == 90
    check_ids([0, 89, ~89], None, 90, "a text")
    for ids in ([90], [~90], [5, 1000]):  # a complement stands for a token that is not learned
        with pytest.raises(DataError):
            check_ids(ids, None, 90, "a text")
