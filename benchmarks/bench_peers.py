"""llmslim beside published formulas for smaller MLPs, on the same calibration text.

    python benchmarks/bench_peers.py --calibration wiki.valid.tokens.gz --tokens 32768
        --test wiki.test.raw.gz [--other OTHER_TEXT ...] [--keep 0.5] [--windows 32]
        [--peers NAME ...] [--heal-tokens 0] [--tasks piqa --piqa ROWS.parquet] [--limit ROWS]
        [--json FILE [--resume]] [--model FOLDER_OR_GGUF] [--threads 1] [--device cuda]

Every method gets the same windows of calibration text and the same share of the MLP parameters,
and is scored on the same windows of other text. The peers are own implementations of the papers'
formulas (`_peers.py`), not the papers' code. llmslim is run twice: `width` alone, and the shipped
recipe `mlp-half` with its budget set to the share.

Where a method leaves biases or takes whole layers, what is really left stands in the table: of the
MLP parameters, and of all parameters outside the embeddings. With `--heal-tokens` every result is
then healed in the same way, the dense model being the teacher, and scored again.

Every method runs in a process of its own, so peak memory is its own too; it is taken after the
fit, before the texts are scored. Seconds are those of the fit. Texts are scored in float32.

Shapes: N windows of L tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
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
from _peers import PEERS
from _tasks import TASKS, accuracies, check_tasks
from torch import Tensor

import llmslim
from llmslim import fitting
from llmslim.atomic import write_whole
from llmslim.recipe import Recipe
from llmslim.storage.load import load_model

DENSE = "dense"
WIDTH = "llmslim, width"
SHIPPED = "llmslim, mlp-half"
METHODS = (DENSE, *PEERS, WIDTH, SHIPPED)


class Job(NamedTuple):
    """One method, and what it is measured on."""

    method: str
    settings: dict[str, Any]
    """Options of the command."""
    fit_NL: Tensor
    held_out_NL: Tensor
    tests: dict[str, Tensor]
    tokenizer: Any
    """Read once: reading it from a GGUF file takes as long as the weights."""


@dataclass(frozen=True)
class Score:
    """How good a model is."""

    perplexity: dict[str, float]
    """By text."""
    accuracy: dict[str, float]
    """By task, between 0 and 1."""


@dataclass(frozen=True)
class Row:
    """What became of one method."""

    method: str
    mlp_kept: float
    """Parameters of the MLPs, as a share of the dense ones."""
    kept: float
    """All parameters outside the embeddings, as a share of the dense ones."""
    score: Score
    seconds: float
    peak_gib: float
    healed: Score | None = None
    heal_seconds: float | None = None


def run(job: Job) -> Row:
    """Fit and measure one method; called in a process of its own."""
    settings = job.settings
    model: Any = load_model(find(settings["model"]), dtype="float32")
    model.to(settings["device"])
    mlp, outside = mlp_parameters(model), non_embedding(model)
    start = time.perf_counter()
    shrink(model, job)
    seconds, peak = time.perf_counter() - start, peak_gib(model.device)
    shares = (mlp_parameters(model) / mlp, non_embedding(model) / outside)
    row = Row(job.method, *shares, score(model, job), seconds, peak)
    if not settings["heal_tokens"] or job.method == DENSE:
        return row
    start = time.perf_counter()
    heal(model, job)
    seconds = time.perf_counter() - start
    return replace(row, healed=score(model, job), heal_seconds=seconds)


def shrink(model: Any, job: Job) -> None:
    """Carry out a method, in place."""
    keep = job.settings["keep"]
    if job.method in PEERS:
        PEERS[job.method](model, job.fit_NL, keep)
    elif job.method != DENSE:
        calibration = fitting.TokenWindows(job.fit_NL, job.held_out_NL)
        fit_recipe(model, our_recipe(job.method, keep), calibration)


def our_recipe(method: str, keep: float) -> Recipe:
    """Return a recipe of llmslim with a share of the MLPs to keep."""
    if method == WIDTH:
        rule = {"match": "*.mlp.*", "structure": "width", "init": "least_squares"}
        return Recipe.of({"name": "width", "replace": [{**rule, "keep_ratio": keep}]})
    shipped = Recipe.load("mlp-half").model_dump(exclude_unset=True)
    return Recipe.of({**shipped, "budget": keep})


def non_embedding(model: Any) -> int:
    """Return how many parameters a model has outside its embeddings and its head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    left_out = {id(module.weight) for module in ends}
    return sum(p.numel() for p in model.parameters() if id(p) not in left_out)


def score(model: Any, job: Job) -> Score:
    """Measure a model on every text and task."""
    model.eval()
    perplexities = {name: perplexity(model, ids_NL) for name, ids_NL in job.tests.items()}
    limit, files = job.settings["limit"], job.settings["files"]
    return Score(perplexities, accuracies(model, job.tokenizer, files, limit))


def heal(model: Any, job: Job) -> None:
    """Train all parameters towards the dense model's predictions, in place."""
    settings = job.settings
    teacher: Any = load_model(find(settings["model"]), dtype="float32")
    llmslim.heal(
        model,
        data=settings["heal_data"],
        teacher=teacher.to(settings["device"]),
        tokenizer=job.tokenizer,
        train="all",
        tokens=settings["heal_tokens"],
        learning_rate=settings["heal_rate"],
        context_length=settings["length"],
        batch_size=2,
        settings={
            "held_out": 0,
            "patience": None,
            "evaluate_every": settings["heal_tokens"],  # more than there are steps: saves none
        },
    )


def read_rows(path: Path | None, settings: dict[str, Any]) -> dict[str, Row]:
    """Return the rows that a file holds, by method; none where there is no file yet.

    Raises:
        UsageError: if no file is named, or they were measured with other settings.
    """
    if path is None:
        raise click.UsageError("--resume: no file to continue. Give --json FILE.")
    if not path.exists():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    for key, value in json.loads(json.dumps(settings)).items():
        known = data["settings"].get(key)
        if known != value:
            raise click.UsageError(
                f"{path}: measured with {key} {known}, not {value}. Give the same options, or "
                "another file."
            )
    rows = {}
    for row in data["rows"]:
        scores = {key: row[key] and Score(**row[key]) for key in ("score", "healed")}
        rows[row["method"]] = Row(**{**row, **scores})
    return rows


def write_rows(path: Path, settings: dict[str, Any], rows: Iterable[Row]) -> None:
    """Write the rows measured so far, in one step."""
    data = {
        "machine": machine(settings["device"]),
        "settings": settings,
        "rows": [asdict(row) for row in rows],
    }
    write_whole(path, json.dumps(data, indent=1))


def cells(row: Row, dense: Row, settings: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    scores = [row.score, row.healed] if settings["heal_tokens"] else [row.score]
    found = [row.method, f"{row.mlp_kept:.3f}", f"{row.kept:.3f}"]
    for name, value in dense.score.perplexity.items():
        for one in scores:
            own = one and one.perplexity[name]
            found += ["", ""] if own is None else [number(own), number(own / value)]
    for name in dense.score.accuracy:
        found += ["" if one is None else f"{one.accuracy[name]:.3f}" for one in scores]
    seconds = [row.seconds, row.heal_seconds][: len(scores)]
    found += ["" if one is None else f"{one:.0f}" for one in seconds]
    return [*found, f"{row.peak_gib:.1f}"]


def header(dense: Row, settings: dict[str, Any]) -> list[str]:
    """Return the head of the table."""
    ways = ["", ", healed"] if settings["heal_tokens"] else [""]
    found = ["method", "MLP kept", "non-embedding kept"]
    for path in dense.score.perplexity:
        found += [cell for way in ways for cell in (f"{Path(path).name}{way}", "x dense")]
    found += [f"{name} accuracy{way}" for name in dense.score.accuracy for way in ways]
    return [*found, *["seconds", "seconds to heal"][: len(ways)], "peak GiB"]


@click.command()
@shared_options
@scoring_options
@click.option("--peers", multiple=True, type=click.Choice(METHODS), help="Repeatable; all if none.")
@click.option("--heal-tokens", default=0, show_default=True, help="Tokens to heal every result on.")
@click.option("--heal-data", multiple=True, help="Text to heal on; the calibration text if none.")
@click.option("--heal-rate", default=3e-4, show_default=True, help="Peak learning rate of healing.")
@click.option("--tasks", multiple=True, type=click.Choice(list(TASKS)), help="Repeatable.")
@click.option("--piqa", help="Parquet file with columns goal, sol1, sol2, label.")
@click.option("--blimp", help="Parquet file with columns sentence_good, sentence_bad.")
@click.option("--limit", type=int, help="Rows of each task; all if not given.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="File to store the rows in.")
@click.option("--resume", is_flag=True, help="Keep the rows of the file; measure the others.")
def main(
    peers: tuple[str, ...],
    tasks: tuple[str, ...],
    piqa: str | None,
    blimp: str | None,
    path: Path | None,
    threads: int | None,
    *,
    resume: bool,
    **settings: Any,
) -> None:
    """Print perplexities and accuracies, their ratio to the dense model's, seconds and memory."""
    set_up(threads)
    settings["files"] = check_tasks(tasks, {"piqa": piqa, "blimp": blimp})
    settings["heal_data"] = settings["heal_data"] or settings["calibration"]
    rows = read_rows(path, settings) if resume else {}
    # The dense model comes first whatever was asked for: it is what the others are compared with.
    chosen = [name for name in METHODS if name == DENSE or not peers or name in peers]
    source, count, length = find(settings["model"]), settings["count"], settings["length"]
    tokenizer, texts = read_tokenizer(source), (settings["test"], *settings["other"])
    tests = {text: first_windows(text, count, length, tokenizer) for text in texts}
    data, tokens = settings["calibration"], settings["tokens"]
    with one_task_each(threads) as pool:
        fitted_to = windows_apart(pool, data, tokens, length, source)
        click.echo(
            f"{machine(settings['device'])}; {fitted_to[0].numel()} tokens to fit to, "
            f"{count} windows of {length} to score\n"
        )
        for name in chosen:
            if name not in rows:
                job = Job(name, settings, *fitted_to, tests, tokenizer)
                rows[name] = pool.submit(run, job).result()
                if path is not None:
                    write_rows(path, settings, rows.values())
            click.echo(" | ".join(cells(rows[name], rows[DENSE], settings)), err=True)
    table = [cells(rows[name], rows[DENSE], settings) for name in chosen]
    click.echo(markdown(header(rows[DENSE], settings), table))


if __name__ == "__main__":
    main()
