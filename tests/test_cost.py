"""What fitting is expected to take, against counts by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest
from click.testing import CliRunner
from tiny import tiny_model

import llmslim
from llmslim.cli.main import cli
from llmslim.fitting.cost import fitting_cost
from llmslim.recipe import Recipe

HIDDEN, WIDTH, LAYERS, VOCABULARY = 48, 96, 4, 96
ATTENTION = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2  # half as many keys and values
PER_TOKEN = 2 * LAYERS * (ATTENTION + 3 * HIDDEN * WIDTH)


def recipe(tokens: int, **changes: Any) -> dict[str, Any]:
    rule = {"match": "*.mlp.*", "structure": "width", "keep_ratio": 0.5}
    spec = {"data": "a.txt", "tokens": tokens}
    return {"init": "least_squares", "calibration": spec, "replace": [rule], **changes}


def test_two_streams_and_the_moments_are_counted() -> None:
    cost = fitting_cost(llmslim.plan(tiny_model("llama"), recipe(16_000)))
    assert cost is not None
    assert cost.tokens == 16_000
    moments = 2 * LAYERS * (WIDTH * WIDTH + WIDTH * HIDDEN + HIDDEN * HIDDEN)
    # A tenth of the layers is fitted to a scrambled copy of every window as well.
    assert cost.flops == (17_000 + 1_600) * (2 * PER_TOKEN + moments)
    streams = 2 * 2 * 4 * (17_000 + 16_000) * HIDDEN
    assert streams < cost.memory < 1.1 * streams


def test_everything_asked_for_on_top_costs_more() -> None:
    model = tiny_model("llama")
    plain = fitting_cost(llmslim.plan(model, recipe(16_000)))
    refined = fitting_cost(llmslim.plan(model, recipe(16_000, refine={"steps": 10})))
    sampled = fitting_cost(llmslim.plan(model, recipe(16_000, calibration={"tokens": 16_000})))
    assert plain is not None
    assert refined is not None
    assert sampled is not None
    # Half of each MLP is left, and nothing else moves.
    assert refined.flops == plain.flops + 10 * 1024 * 4 * LAYERS * 3 * HIDDEN * WIDTH
    assert sampled.flops == plain.flops + 2 * 17_000 * (PER_TOKEN + 2 * HIDDEN * VOCABULARY)
    half = {"data": ["text.txt", "self"], "tokens": 16_000}
    half_sampled = fitting_cost(llmslim.plan(model, recipe(16_000, calibration=half)))
    assert half_sampled is not None
    assert 2 * (half_sampled.flops - plain.flops) == sampled.flops - plain.flops


def test_what_is_inside_a_layer_takes_a_third_pass_and_the_largest_map_its_memory() -> None:
    """Of a low rank, every map has moments: of its inputs, its targets, and the two together."""
    rule = {"match": ["*.mlp.*", "*.o_proj"], "structure": "low_rank", "rank": 4}
    cost = fitting_cost(llmslim.plan(tiny_model("llama"), recipe(16_000, replace=[rule])))
    assert cost is not None
    numbers = {
        (i, o): i * i + i * o + o * o
        for i, o in ((HIDDEN, WIDTH), (WIDTH, HIDDEN), (HIDDEN, HIDDEN))
    }
    moments = numbers[HIDDEN, WIDTH] * 2 + numbers[WIDTH, HIDDEN] + numbers[HIDDEN, HIDDEN]
    assert cost.flops == (17_000 + 1_600) * (3 * PER_TOKEN + 2 * LAYERS * moments)
    streams = 2 * 2 * 4 * (17_000 + 16_000) * HIDDEN
    layer = 2 * 4 * PER_TOKEN // 2 // LAYERS  # a dense copy of it, and the slim one, in float32
    assert cost.memory == streams + 6 * 8 * numbers[HIDDEN, WIDTH] + layer


def test_choosing_measures_every_unit() -> None:
    rule = {"match": "*.mlp.*", "structure": "auto"}
    model = tiny_model("llama")
    plain = fitting_cost(llmslim.plan(model, recipe(16_000)))
    chosen = fitting_cost(llmslim.plan(model, recipe(16_000, budget=0.5, replace=[rule])))
    assert plain is not None
    assert chosen is not None
    walk = (16_384 + 8_192) * (PER_TOKEN + LAYERS * 2 * WIDTH * WIDTH)
    # On the average half the layers run after the one that is tried, and the head.
    trials = LAYERS * 2_048 * (PER_TOKEN // 2 + 2 * HIDDEN * VOCABULARY)
    assert chosen.flops == plain.flops + walk + trials


def test_training_end_to_end_runs_the_slim_model_and_the_dense_head() -> None:
    model = tiny_model("llama")
    calibration = {"data": "text.txt", "tokens": 16_000, "sequence_length": 512}
    more = {"steps": 10, "end_to_end": {"steps": 5, "tokens": 1_100}}
    plain, trained = (
        llmslim.plan(model, recipe(16_000, calibration=calibration, refine=refine))
        for refine in ({"steps": 10}, more)
    )
    slim = 2 * sum(row.params_after for row in trained.rows if row.kind == "projection")
    head = 2 * HIDDEN * VOCABULARY
    # Forward and backward through the slim model, and the dense head; nine times on held-out text.
    steps = 5 * 1_024 * (3 * (slim + head) + head)
    checks = 9 * 1_000 * (slim + head + head)
    difference = fitting_cost(trained).flops - fitting_cost(plain).flops
    assert difference == pytest.approx(steps + checks, rel=1e-6)


def test_without_text_there_is_no_such_cost() -> None:
    rule = {"match": "*.mlp.*", "structure": "low_rank", "rank": 4}
    assert fitting_cost(llmslim.plan(tiny_model("llama"), {"replace": [rule]})) is None


@pytest.mark.parametrize("command", [["plan"], ["convert", "--dry-run"]])
def test_the_command_line_says_it(tmp_path: Any, command: list[str]) -> None:
    llmslim.save(tiny_model("llama"), tmp_path / "dense")
    arguments = [command[0], str(tmp_path / "dense"), *command[1:], "--recipe", "mlp-half"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    tokens = Recipe.load("mlp-half").calibration.tokens
    assert re.search(
        rf"fitting to {tokens:,} tokens: about [\d.]+ \w+ of memory beside the model and 1 min",
        result.output,
    )
