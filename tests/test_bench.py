"""Speeds: against clocks and counts of their own."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cli import _restore_logging as _restore_logging
from helpers_cli import dense as dense
from helpers_cli import ok
from helpers_cli import recipe as recipe
from helpers_cli import slim as slim
from transformers import AutoModelForCausalLM

import llmslim
from llmslim.errors import CheckpointError, DataError
from llmslim.evaluation import speed
from llmslim.report.page.html import report_page
from llmslim.report.read import read_report
from llmslim.report.speeds import Benchmark, Speed, keep_benchmark, read_benchmarks, speed_rows

SIZES: dict[str, Any] = {"batch": (1, 3), "prompt": 6, "new_tokens": 5, "rounds": 3}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> float:
    """Make every step of a model take a known time more; return it, in seconds."""
    taken = 0.02

    def wait(*_: Any) -> None:
        time.sleep(taken)

    opened = speed.opened

    def with_wait(model: Any, options: Any) -> Any:
        found = opened(model, options)
        found[0].register_forward_hook(wait)
        return found

    monkeypatch.setattr(speed, "opened", with_wait)
    return taken


def test_speeds_are_those_of_a_clock(slim: Path, slow: float) -> None:
    found = llmslim.bench(slim, store=False, **SIZES)
    assert [one.batch for one in found.speeds] == [1, 3]
    for one in found.speeds:
        assert slow < one.first_token_seconds < 10 * slow
        assert one.prefill == pytest.approx(one.batch * 6 / one.first_token_seconds, rel=0.5)
        assert one.batch / (5 * slow) < one.decode < one.batch / slow


def test_memory_is_that_of_weights_and_cache(dense: Path) -> None:
    found = llmslim.bench(dense, **SIZES)
    model = AutoModelForCausalLM.from_pretrained(dense)
    weights = sum(one.nbytes for one in model.parameters())
    for one in found.speeds:
        ids = torch.zeros(one.batch, 6 + 5 - 1, dtype=torch.long)  # the last token is never read
        cache = model(ids, use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert one.memory == weights + held


def test_models_take_turns(slim: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []

    def measure(model: Any, batch: int, options: Any) -> Speed:
        turns.append((type(model).__name__, batch))
        # The first round is slow: it warms up, and does not count.
        seconds = float(100 if len(turns) <= 2 else len(turns))
        return Speed(batch, seconds, 1 / seconds, 1 / seconds, len(turns))

    monkeypatch.setattr(speed, "_measure", measure)
    found = llmslim.bench(slim, dense, store=False, **{**SIZES, "batch": 2})
    ours, theirs = dict.fromkeys(name for name, _ in turns)
    assert turns == [(ours, 2), (theirs, 2)] * 4
    assert [one.first_token_seconds for one in (*found.speeds, *found.dense)] == [5, 6]
    assert found.speeds[0].memory == 7  # the most of the rounds that count
    totals = read_report(slim).report.totals
    assert found.ideal == totals.flops_per_token_before / totals.flops_per_token_after > 1


def test_the_share_of_the_ideal_is_honest() -> None:
    ours, theirs = Speed(8, 0.2, 100.0, 30.0, 10), Speed(8, 0.1, 50.0, 40.0, 20)
    found = Benchmark("m", "cpu", "f", 4, 4, 3, "all", (ours,), "dense", (theirs,), 3.0)
    rows = {row.name: row for row in speed_rows(found)}
    prefill, decode = rows["prefill, tokens/s"], rows["decode, tokens/s"]
    assert (prefill.ratio, prefill.reached, prefill.worse) == ("2.00x", "50 %", False)
    assert (decode.ratio, decode.reached, decode.worse) == ("0.75x", "-12 %", True)
    assert (rows["first token, ms"].worse, rows["memory"].worse) == (True, False)


def test_a_batch_that_does_not_fit_is_named(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = speed._measure

    def measure(model: Any, batch: int, options: Any) -> Speed:
        if batch == 3:
            raise torch.OutOfMemoryError
        return whole(model, batch, options)

    monkeypatch.setattr(speed, "_measure", measure)
    found = llmslim.bench(dense, **SIZES)
    assert [one.batch for one in found.speeds] == [1]
    assert ["3" in note for note in found.notes] == [True]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch": 0}, ["batch", "0"]),
        ({"batch": ()}, ["batch", "0"]),
        ({"prompt": 0}, ["prompt", "0"]),
        ({"new_tokens": 1}, ["new_tokens", "1", "2"]),
        ({"rounds": 0}, ["rounds", "0"]),
        ({"prompt": 100_000}, ["prompt", "100005"]),
    ],
)
def test_wrong_numbers_are_errors(options: dict[str, Any], named: list[str], dense: Path) -> None:
    with pytest.raises(DataError) as error:
        llmslim.bench(dense, **{**SIZES, **options})
    assert all(word in str(error.value) for word in named)


def test_speeds_are_kept_and_shown(slim: Path, dense: Path) -> None:
    sizes = ("--batch", 2, "--prompt", 4, "--new-tokens", 3, "--rounds", 1)
    printed = json.loads(ok("bench", slim, "--against", dense, *sizes, "--json", "-"))
    (kept,) = read_benchmarks(slim)
    assert ok("verify", slim)
    assert printed["speeds"][0]["decode"] == kept.speeds[0].decode
    decode = f"{kept.speeds[0].decode:,.1f}"
    assert decode in ok("report", slim)
    assert decode in ok("compare", slim, slim)
    assert decode in report_page(read_report(slim))
    again = llmslim.bench(slim, batch=1, prompt=4, new_tokens=3, rounds=1)
    other = llmslim.bench(slim, batch=1, prompt=4, new_tokens=3, rounds=1, dtype="bfloat16")
    assert read_benchmarks(slim) == (again, other)
    assert decode not in ok("bench", slim, *sizes, "--no-store")
    assert read_benchmarks(slim) == (again, other)
    (slim / "llmslim_benchmark.json").write_text("[{}]")
    with pytest.raises(CheckpointError, match=r"llmslim_benchmark\.json"):
        keep_benchmark(slim, again)
    (slim / "llmslim_benchmark.json").unlink()
