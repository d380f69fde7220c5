"""Scores of a model, held against plain loops over transformers' own losses."""

from __future__ import annotations

import json
import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers_cli import _restore_logging as _restore_logging
from helpers_cli import dense as dense
from helpers_cli import ok, run, write_tokenizer
from helpers_cli import recipe as recipe
from helpers_cli import slim as slim
from scipy.stats import bootstrap
from tiny import logits, tiny_model
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmslim
from llmslim.errors import CheckpointError, DataError
from llmslim.evaluation import Estimate, Evaluation, TaskScore, keep_evaluation, read_evaluation
from llmslim.evaluation import run as runs

WORDS = " ".join(f"w{(7 * n * n + n) % 93}" for n in range(900))
SIZES: dict[str, int] = {"windows": 6, "length": 20}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "test.txt"
    path.write_text(WORDS)
    return path


def windows_of(folder: Path) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)(WORDS, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: 6 * 20]).view(6, 20)


def test_scores_are_those_of_a_plain_loop(dense: Path, slim: Path, text: Path) -> None:
    found = llmslim.evaluate(slim, dense, text=str(text), store=False, **SIZES).texts[0]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path) for path in (slim, dense))
    ids = windows_of(dense)
    losses = [
        [float(model(row[None], labels=row[None]).loss.detach()) for row in ids]
        for model in (ours, theirs)
    ]
    assert found.loss.mean == pytest.approx(sum(losses[0]) / 6, rel=1e-4)
    assert found.perplexity.mean == pytest.approx(math.exp(sum(losses[0]) / 6), rel=1e-4)
    assert found.dense_loss.mean == pytest.approx(sum(losses[1]) / 6, rel=1e-4)
    log_q, log_p = (logits(model, ids).log_softmax(-1) for model in (ours, theirs))
    apart = float(kl_div(log_q, log_p, reduction="sum", log_target=True)) / ids.numel()
    assert found.divergence.mean == pytest.approx(apart, rel=1e-4)
    same = (log_q.argmax(-1) == log_p.argmax(-1)).float().mean()
    assert found.agreement.mean == pytest.approx(float(same))
    assert (found.text, found.windows, found.length) == ("test.txt", 6, 20)


def test_a_model_agrees_with_itself(dense: Path, text: Path) -> None:
    found = llmslim.evaluate(dense, dense, text=[str(text)], **SIZES).texts[0]
    assert found.divergence.mean == pytest.approx(0, abs=1e-6)
    assert found.agreement == Estimate(1.0, 1.0, 1.0)
    assert found.loss == found.dense_loss


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Of 2,000 samples of six values, 95 % have the true mean in their interval."""
    values = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0)) + 3
    estimates = [Estimate.of(row.tolist()) for row in values]
    covered = sum(one.low <= 3 <= one.high for one in estimates) / len(estimates)
    assert covered == pytest.approx(0.95, abs=0.012)


def test_an_interval_is_near_that_of_a_bootstrap() -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(1)).tolist()
    ours = Estimate.of(values)
    other = bootstrap((values,), lambda x, axis: x.mean(axis), rng=0).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((other.low, other.high), abs=0.02)
    assert Estimate.of([2.0]) == Estimate(2.0)


def test_a_model_in_memory_is_left_as_it_was(dense: Path, text: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense).train()
    found = llmslim.evaluate(model, text=str(text), **SIZES).texts[0]
    assert model.training
    assert found.loss == llmslim.evaluate(dense, text=str(text), **SIZES).texts[0].loss
    assert found.divergence is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, ["--text", "--tasks"]),
        ({"text": "no such file.txt"}, ["no such file.txt"]),
        ({"windows": 0}, ["windows", "0"]),
        ({"length": 1}, ["length", "1"]),
        ({"length": 5000}, ["length", "5000"]),
        ({"limit": 0, "tasks": "piqa"}, ["limit", "0"]),
        ({"tasks": "mine.yaml"}, ["tasks"]),
    ],
)
def test_what_cannot_be_scored_is_an_error(
    options: dict[str, Any], named: list[str], dense: Path, text: Path
) -> None:
    if options and not options.keys() & {"text", "tasks"}:
        options = {"text": str(text), **options}
    with pytest.raises(DataError) as error:
        llmslim.evaluate(dense, **options)
    assert all(value in str(error.value) for value in named)


def test_another_vocabulary_is_refused(dense: Path, text: Path, tmp_path: Path) -> None:
    tiny_model(num_hidden_layers=1, vocab_size=120).save_pretrained(tmp_path / "other")
    write_tokenizer(tmp_path / "other")
    with pytest.raises(DataError, match=r"against.*120.*96"):
        llmslim.evaluate(dense, tmp_path / "other", text=str(text), **SIZES)


def test_scores_are_kept_beside_a_checkpoint_and_shown(
    slim: Path, dense: Path, text: Path, tmp_path: Path
) -> None:
    shown = ok("eval", slim, "--text", text, "--against", dense, "--windows", 6, "--length", 20)
    assert ok("verify", slim)  # they are no part of the checkpoint
    kept = read_evaluation(slim)
    assert kept is not None
    for line in (shown, ok("report", slim)):
        assert f"{kept.texts[0].perplexity.mean:.2f} [" in line
    more = ok("eval", slim, "--text", text, "--windows", 3, "--length", 20, "--json", "-")
    both = json.loads(more)
    assert [one["windows"] for one in both["texts"]] == [6, 3]
    assert read_evaluation(slim) == Evaluation(**_tuples(both))
    (slim / "llmslim_evaluation.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match="model"):
        read_evaluation(slim)
    (slim / "llmslim_evaluation.json").unlink()
    ok("eval", slim, "--text", text, "--no-store", "--windows", 3, "--length", 20)
    assert read_evaluation(slim) is None


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    from pydantic import TypeAdapter

    return vars(TypeAdapter(Evaluation).validate_python(data))


def test_resume_leaves_out_what_is_kept(
    slim: Path, dense: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"text": str(text), **SIZES}
    first = llmslim.evaluate(slim, **options)

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("scored again")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "score_text", again)
        assert llmslim.evaluate(slim, resume=True, **options) == first
        with pytest.raises(AssertionError):  # nothing is known of the dense model yet
            llmslim.evaluate(slim, dense, resume=True, **options)
        with pytest.raises(AssertionError):
            llmslim.evaluate(slim, **options)
    (slim / "llmslim_evaluation.json").unlink()


def test_newer_scores_take_the_place_of_older_ones(tmp_path: Path) -> None:
    old, new = TaskScore("t", "acc", 0.5), TaskScore("t", "acc", 0.75, 0.1, 20)
    other = TaskScore("t", "acc_norm", 0.1)
    keep_evaluation(tmp_path, Evaluation("m", "dense", tasks=(old, other), versions={"a": "1"}))
    found = keep_evaluation(tmp_path, Evaluation("m", tasks=(new,), versions={"a": "2"}))
    assert found == read_evaluation(tmp_path)
    assert found.tasks == (new, other)
    assert (found.against, found.versions) == ("dense", {"a": "2"})


def test_tasks_without_the_harness_name_the_extra(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run("eval", dense, "--tasks", "piqa")
    assert result.exit_code == 1
    assert "llmslim-toolkit[eval]" in result.stderr


def test_a_local_task_gives_what_the_harness_gives(dense: Path, tmp_path: Path) -> None:
    # Reason to skip: it brings forty packages; scripts/test --all installs them.
    lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    rows = [{"a": f"w{n}", "b": f"w{n + 40}", "label": n % 2} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "rows.jsonl")}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "w1 w2",
        "doc_to_target": "label",
        "doc_to_choice": "{{[a, b]}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(config))  # JSON is YAML
    found = llmslim.evaluate(dense, tasks=str(tmp_path / "mine.yaml"))
    model = AutoModelForCausalLM.from_pretrained(dense)
    hflm = lm_eval.models.huggingface.HFLM(
        pretrained=model, tokenizer=AutoTokenizer.from_pretrained(dense)
    )
    by_hand = lm_eval.simple_evaluate(
        model=hflm,
        tasks=[config],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )
    wanted = by_hand["results"]["mine"]["acc,none"]
    (score,) = [one for one in found.tasks if one.metric == "acc"]
    assert (score.task, score.value, score.rows) == ("mine", wanted, 12)


@pytest.mark.parametrize(
    "text", [None, "doc_to_text: !function code.text\n", "- a\n", "include: other.yaml\n", "a: [\n"]
)
def test_a_file_that_is_no_task_is_refused_before_any_work(
    text: str | None, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = ModuleType("lm_eval")
    harness.__spec__ = ModuleSpec("lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    file = tmp_path / "task.yaml"
    if text is not None:
        file.write_text(text)
    result = run("eval", dense, "--tasks", str(file))
    assert result.exit_code == 1
    assert "task.yaml" in result.stderr
