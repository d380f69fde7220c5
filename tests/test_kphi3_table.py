"""benchmarks/bench_kphi3_table.py: its rows have the sizes meant, and it trains and continues."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from helpers_cli import _restore_logging as _restore_logging
from helpers_data import alone as alone
from helpers_data import jsonl
from torch.nn.functional import cross_entropy

import llmslim
from llmslim.modeling.grouped_pointwise import GroupedPointwise

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_kphi3_table as bench
from _kphi3_rows import SCALES, Row, Scale, rows_of

TINY = rows_of(SCALES["tiny"])


@pytest.mark.parametrize("name", SCALES)
def test_every_scale_has_the_reports_groups(name: str) -> None:
    for row in ("kphi3-2", "kphi3-3", "published", "learned_order"):
        plan = llmslim.plan(rows_of(SCALES[name])[row].config(8), rows_of(SCALES[name])[row].recipe)
        groups = [site.spec["groups"] for site in plan.sites]
        assert sorted(groups[:4]) == [12, 12, 12, 32]
        assert groups == groups[:4] * (len(groups) // 4)


@pytest.mark.parametrize("name", SCALES)
def test_rows_have_the_parameters_meant(name: str) -> None:
    rows, divisor = rows_of(SCALES[name]), SCALES[name].divisor
    hidden, dense, grouped = 3072 // divisor, 8192 // divisor, 9216 // divisor
    by_hand = {
        "phi3-2": 2 * (4 * hidden**2 + 3 * hidden * dense + 2 * hidden) + hidden,
        **{
            f"kphi3-{layers}": layers
            * (
                2 * hidden * (3 * hidden + hidden + 2 * grouped) // 12
                + 2 * grouped * hidden // 32
                + 2 * hidden
            )
            + hidden
            for layers in (2, 3)
        },
    }
    by_hand["dense-small"] = by_hand["phi3-2"]
    assert {row: rows[row].parameters for row in by_hand} == by_hand
    whole = by_hand["kphi3-3"]
    assert rows["published"].parameters == rows["learned_order"].parameters == whole
    for row in rows.keys() - by_hand.keys():
        assert 0.985 * whole <= rows[row].parameters <= whole, row
    assert rows["dense-narrow"].layers == 3
    assert (rows["dense-1"].layers, rows["dense-1"].hidden) == (1, hidden)


@pytest.mark.parametrize("name", TINY)
def test_a_model_has_the_parameters_of_its_row_and_its_seeds_weights(name: str) -> None:
    row = TINY[name]
    state = torch.random.get_rng_state()
    models = [row.model(row.config(16), seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    embeddings = 2 * 16 * row.hidden
    assert sum(p.numel() for p in models[0].parameters()) - embeddings == row.parameters
    one, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_a_row_is_what_convert_draws(tmp_path: Path) -> None:
    row = TINY["kphi3-2"]
    row.config(16).save_pretrained(tmp_path / "bare")
    made = llmslim.convert(tmp_path / "bare", row.recipe, tmp_path / "out", init="random", seed=4)
    ours, theirs = row.model(row.config(16), 4).state_dict(), llmslim.load(made.path).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_learned_order_differs_in_its_channels_and_not_in_its_scale() -> None:
    learned, fixed = (
        row.model(row.config(16), 0).model.layers[0].mlp.down_proj
        for row in (TINY["learned_order"], TINY["kphi3-3"])
    )
    assert isinstance(learned, GroupedPointwise)
    assert learned.order is not None
    width, groups = 1152, 32
    # By hand: those of a contiguous block, and of one residue class.
    first = {*range(width // groups), *range(0, width, groups)}
    assert set(learned.order[0].tolist()) != first
    spread = [float(block.weight.detach().std()) for block in (learned, fixed)]
    assert spread[0] == pytest.approx(spread[1], rel=0.05)


def test_the_best_rate_of_a_row_counts_over_all_its_seeds() -> None:
    def run(row: str, rate: float, seed: int, loss: float) -> dict[str, Any]:
        found = {"row": row, "rate": rate, "seed": seed, "validation_loss": loss}
        return {**found, "train_loss": 1.0, "tokens_per_second": 10.0, "seconds": 2.0}

    runs = [run("kphi3-3", 1e-3, 0, 1.0), run("kphi3-3", 1e-3, 1, 5.0)]
    runs += [run("kphi3-3", 2e-3, 0, 2.0), run("kphi3-3", 2e-3, 1, 3.0)]
    runs += [run("phi3-2", 1e-3, 0, 4.0)]
    best = bench.best_runs(runs)
    assert best["kphi3-3"] == runs[2:4]
    text = bench.table(runs, TINY).splitlines()
    assert len(text) == 2 + 2
    cells = [cell.strip() for cell in text[3].split("|")]
    assert cells[1] == "kphi3-3"
    assert "2.500 ± 0.707" in cells
    assert f"{100 * TINY['kphi3-3'].parameters / TINY['phi3-2'].parameters:.1f} %" in cells


# ------------------------------------------------------------------------------- training

SMALL = Scale(
    divisor=8,
    vocabulary=300,
    context_length=32,
    batch_size=2,
    tokens=None,
    held_out=4,
    rates=(1e-3,),
    seeds=1,
)


@pytest.fixture
def text(tmp_path: Path) -> str:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [
        {"instruction": f"What is {n} after {words[n % 10]}?", "response": f"{words[(n + 1) % 10]}"}
        for n in range(40)
    ]
    return jsonl(tmp_path / "text.jsonl", rows)


def run(text: str, path: Path, *more: str) -> Result:
    arguments = ["--text", text, "--json", str(path), "--tokens", "400", "--passes", "2", *more]
    return CliRunner().invoke(bench.main, arguments)


def test_a_run_trains_saves_and_continues(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCALES, "tiny", SMALL)
    path = tmp_path / "table.json"
    rates = ["--rates", "1e-3,1e-2", "--threads", "1"]
    result = run(text, path, "--rows", "kphi3-2", *rates)
    assert result.exit_code == 0, result.output
    runs = json.loads(path.read_text())["runs"]
    assert [(r["row"], r["seed"], r["rate"]) for r in runs] == [
        ("kphi3-2", 0, 1e-3),
        ("kphi3-2", 0, 1e-2),
    ]
    for one in runs:
        assert one["parameters"] == TINY["kphi3-2"].parameters
        assert one["tokens"] >= 400
        assert one["curve"][-1][0] == one["tokens"]
    # The same tokens for both, whose losses differ by what they learned from them.
    assert runs[0]["tokens"] == runs[1]["tokens"]
    assert runs[0]["validation_loss"] != runs[1]["validation_loss"]
    assert path.with_suffix(".svg").read_text().startswith("<?xml")
    assert "kphi3-2" in path.with_suffix(".md").read_text()

    assert run(text, path, "--rows", "kphi3-2").exit_code == 2
    assert run(text, path, "--rows", "kphi3-2", "--passes", "3", "--resume").exit_code == 2
    before = Path(text).read_text()
    Path(text).write_text(before.replace("three", "four"))
    assert run(text, path, "--rows", "kphi3-2", *rates, "--resume").exit_code == 2
    Path(text).write_text(before)
    trained = []

    def counted(row: Row, seed: int, rate: float, *rest: Any) -> dict[str, Any]:
        trained.append((row.name, seed, rate))
        return {**runs[0], "row": row.name, "seed": seed, "rate": rate}

    monkeypatch.setattr(bench, "train", counted)
    result = run(text, path, "--rows", "kphi3-2,kphi3-3", *rates, "--resume")
    assert result.exit_code == 0, result.output
    assert trained == [("kphi3-3", 0, 1e-3), ("kphi3-3", 0, 1e-2)]
    assert len(json.loads(path.read_text())["runs"]) == 4


def test_the_losses_are_those_of_the_model_that_is_kept(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCALES, "tiny", SMALL)
    work = tmp_path / "work"
    result = run(text, tmp_path / "t.json", "--rows", "kphi3-2", "--work", str(work))
    assert result.exit_code == 0, result.output
    (kept,) = json.loads((tmp_path / "t.json").read_text())["runs"]
    (folder,) = work.iterdir()
    model = llmslim.load(folder)
    tokenizer = bench.trained_tokenizer(text, SMALL.vocabulary)
    heal = bench.section(SMALL, text, 400, 2)
    packed = bench.healing_text(heal, tokenizer, context_length=32)
    total = count = 0.0
    for row in packed.held_out:
        begins = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), 32]
        for begin, end in itertools.pairwise(begins):
            labels = row["labels"][begin:end][1:]
            if not (labels != -100).any():
                continue
            with torch.no_grad():
                logits = model(row["input_ids"][None, begin:end], use_cache=False).logits[0, :-1]
            total += float(cross_entropy(logits, labels, reduction="sum"))
            count += float((labels != -100).sum())
    assert kept["validation_loss"] == pytest.approx(total / count, rel=1e-4)


def test_the_text_has_the_reports_form_and_its_tags_are_tokens(text: str) -> None:
    tokenizer = bench.trained_tokenizer(text, 300)
    heal = bench.section(SMALL, text, None, 1)
    assert (heal.template, heal.loss_on, heal.train) == ("report", "all", "all")
    assert (heal.schedule, heal.warmup, heal.weight_decay) == ("constant", 0, 0)
    packed = bench.healing_text(heal, tokenizer, context_length=64)
    ids = packed.train[0]["input_ids"].tolist()
    sample = tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id) + 1])
    assert sample.startswith("<|user|>What is ")
    assert sample.endswith("<|end|><|endoftext|>")
    assert len(tokenizer("<|end|><|assistant|>")["input_ids"]) == 2


@pytest.mark.parametrize(
    "given", [["--rows", "nonsense"], ["--rates", "fast"], ["--rates", "-1"], ["--scale", "full"]]
)
def test_what_is_wrong_is_refused_before_any_work(
    text: str, tmp_path: Path, given: list[str]
) -> None:
    result = run(text, tmp_path / "t.json", *given)
    assert result.exit_code == 2
    assert not (tmp_path / "t.json").exists()


@pytest.mark.slow
def test_the_first_steps_at_full_size(text: str) -> None:
    """Gigabytes of weights and moments; the loss of random weights is that of guessing."""
    scale = replace(SCALES["full"], context_length=32, held_out=1)
    row = rows_of(scale)["kphi3-2"]
    tokenizer = bench.trained_tokenizer(text, 300)
    heal = bench.section(scale, text, 30, 1)
    packed = bench.healing_text(heal, tokenizer, context_length=32)
    found = bench.train(row, 0, 1e-4, heal, packed, tokenizer, None)
    assert found["parameters"] == 35_011_584
    first = found["curve"][0][1]
    assert first == pytest.approx(torch.tensor(32_064.0).log().item(), abs=1.0)
