"""Perplexity of a whole model whose MLP projections were fitted, before any healing.

    python benchmarks/bench_perplexity.py --calibration wiki.valid.tokens.gz --test wiki.test.raw.gz
        [--calibration self ...] [--other OTHER_TEXT ...] [--model FOLDER_OR_GGUF] [--keep 0.5]
        [--tokens 65536] [--windows 32] [--methods low_rank --methods width] [--refine-steps 64]
        [--training-steps 128] [--threads 1] [--device cuda]

Next to the dense model stand three fits that look at no data; the whitened SVD as the field does it
(SVD-LLM, Wang et al. 2024, arXiv:2403.07378: every projection alone, on the dense model's inputs);
the least-squares ones, fitted layer by layer to the inputs that the slim model itself produces; and
`auto`, where every layer's share is measured first. What is called refined has a gradient fit of
each layer after the closed forms, and what is called trained that and a training of the whole
model. Every method runs in a process of its own, so peak memory is its own too; it is taken after
the fit, before the texts are scored. Seconds are those of the fit. Texts are scored in float32.

Shapes: N windows of L tokens.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import click
from _common import (
    find,
    first_windows,
    fit_recipe,
    machine,
    markdown,
    mlp_parameters,
    number,
    one_task_each,
    peak_gib,
    perplexity,
    read_tokenizer,
    scoring_options,
    set_up,
    shared_options,
    windows_apart,
)
from _peers import whitened_svd
from torch import Tensor

from llmslim import fitting
from llmslim.recipe import Recipe
from llmslim.storage.load import load_model

WHITENED = "low_rank, whitened SVD"
METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "io, masked copy": {"structure": "grouped_pointwise", "init": "project"},
    "low_rank, plain SVD": {"structure": "low_rank", "init": "project"},
    "width, by weight norms": {"structure": "width", "init": "project"},
    WHITENED: {"structure": "low_rank"},
    "io, learned order": {
        "structure": "grouped_pointwise",
        "channel_order": "learned",
        "init": "least_squares",
    },
    "io, learned order, refined": {
        "structure": "grouped_pointwise",
        "channel_order": "learned",
        "init": "least_squares",
    },
    "low_rank": {"structure": "low_rank", "init": "least_squares"},
    "low_rank, refined": {"structure": "low_rank", "init": "least_squares"},
    "pivoted_low_rank": {"structure": "pivoted_low_rank", "init": "least_squares"},
    "width": {"structure": "width", "init": "least_squares"},
    "auto": {"structure": "auto"},
    "auto, refined": {"structure": "auto"},
    "io, learned order, trained": {
        "structure": "grouped_pointwise",
        "channel_order": "learned",
        "init": "least_squares",
    },
    "width, trained": {"structure": "width", "init": "least_squares"},
    "auto, trained": {"structure": "auto"},
}


class Job(NamedTuple):
    """One method, and what it is measured on."""

    method: str
    model: str | None
    keep: float
    refine_steps: int
    training_steps: int
    device: str
    fit_NL: Tensor
    held_out_NL: Tensor
    tests: dict[str, Tensor]


class Result(NamedTuple):
    """What became of it."""

    kept: float
    """Parameters of the MLPs, as a share of the dense ones."""
    perplexity: dict[str, float]
    seconds: float
    peak_gib: float


def run(job: Job) -> Result:
    """Fit and measure one method; called in a process of its own."""
    model: Any = load_model(find(job.model), dtype="float32")
    model.to(job.device)
    before = mlp_parameters(model)
    rule = METHODS[job.method]
    start = time.perf_counter()
    if job.method == WHITENED:
        whitened_svd(model, job.fit_NL, job.keep)
    elif rule is not None:
        calibration = fitting.TokenWindows(job.fit_NL, job.held_out_NL)
        fit_recipe(model, recipe_of(job, rule), calibration)
    seconds = time.perf_counter() - start
    peak = peak_gib(model.device)
    found = {name: perplexity(model, ids_NL) for name, ids_NL in job.tests.items()}
    return Result(mlp_parameters(model) / before, found, seconds, peak)


def recipe_of(job: Job, rule: dict[str, Any]) -> Recipe:
    """Return the recipe of one method at one size."""
    made: dict[str, Any] = {"name": "bench", "replace": [{"match": "*.mlp.*", **rule}]}
    if rule["structure"] == "auto":
        made["budget"] = job.keep
    else:
        made["replace"][0]["keep_ratio"] = job.keep
    if "refined" in job.method or "trained" in job.method:
        made["refine"] = {"steps": job.refine_steps}
    if "trained" in job.method:
        made["refine"]["end_to_end"] = {"steps": job.training_steps}
    return Recipe.of(made)


@click.command()
@shared_options
@scoring_options
@click.option("--refine-steps", default=64, show_default=True, help="Of the methods refined.")
@click.option("--training-steps", default=128, show_default=True, help="Of the methods trained.")
@click.option("--methods", multiple=True, type=click.Choice(list(METHODS)), help="Repeatable.")
def main(
    model: str | None,
    calibration: tuple[str, ...],
    tokens: int,
    length: int,
    threads: int | None,
    test: str,
    other: tuple[str, ...],
    count: int,
    keep: float,
    refine_steps: int,
    training_steps: int,
    device: str,
    methods: tuple[str, ...],
) -> None:
    """Print perplexities before healing, their ratio to the dense model's, seconds and memory."""
    set_up(threads)
    # The dense model always comes first: it is what the others are compared with.
    chosen = ["dense", *(name for name in methods or METHODS if name != "dense")]
    tokenizer = read_tokenizer(find(model))
    tests = {path: first_windows(path, count, length, tokenizer) for path in (test, *other)}
    rows, dense = [], {}
    with one_task_each(threads) as pool:
        fit_NL, held_out_NL = windows_apart(pool, calibration, tokens, length, find(model))
        click.echo(
            f"{machine(device)}; {fit_NL.numel()} tokens to fit to, {count} windows of {length} "
            "to score\n"
        )
        for name in chosen:
            texts = (fit_NL, held_out_NL, tests)
            job = Job(name, model, keep, refine_steps, training_steps, device, *texts)
            result = pool.submit(run, job).result()
            dense = dense or result.perplexity
            scores = [
                f"{number(value)} ({number(value / dense[path])})"
                for path, value in result.perplexity.items()
            ]
            cost = [f"{result.seconds:.0f}", f"{result.peak_gib:.1f}"]
            rows.append([name, f"{result.kept:.3f}", *scores, *cost])
            click.echo(" | ".join(rows[-1]), err=True)
    names = [f"{path.rsplit('/', 1)[-1]} (ratio to dense)" for path in tests]
    click.echo(markdown(["method", "MLP kept", *names, "seconds", "peak GiB"], rows))


if __name__ == "__main__":
    main()
