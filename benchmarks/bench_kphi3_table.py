"""The kphi-3 report's table: dense Phi-3 against grouped ones, all from random weights.

    python benchmarks/bench_kphi3_table.py --scale tiny --text instruct_open.parquet
        [--rows report] [--rates 1e-3,3e-3] [--seeds 3] [--tokens 3000000] [--passes 3]
        [--json kphi3-tiny.json --resume] [--threads 1]
    python benchmarks/bench_kphi3_table.py --scale full --text lamini --tokenizer PHI3 --work RUNS

Every row is trained by `llmslim.heal` with the `heal` section of the recipe kphi3-3layer, on the
same tokens in the same order; seeds differ in the weights that are drawn. Rows, widths and scales
are in `_kphi3_rows.py`. The first seed tries every learning rate, the others take the one with the
lowest validation loss, which is the row's.

Train loss: mean over the last tenth of the steps. Validation loss: of the held-out rows, after the
last step. Tokens/s: of training alone; seconds: with measuring. The JSON file holds every run, the
table (.md) and the losses (.svg, with matplotlib) stand beside it.

Left out: the best number of passes or the best batch for each row; all have the same.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import click
from _common import machine, markdown, set_up
from _kphi3_rows import SCALES, Row, Scale, rows_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import llmslim
from llmslim.atomic import write_whole
from llmslim.data import HealingText, healing_text, read_texts
from llmslim.healing import folder_beside
from llmslim.healing.rows import text_digest
from llmslim.recipe import Heal, Recipe
from llmslim.storage.load import load_tokenizer

REPORT = ("phi3-2", "kphi3-2", "kphi3-3")
"""The report's own rows."""
_TAGS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
_DOCUMENTS = 50_000  # that the tokenizer is trained on
_MEASURED = 5
_POINTS = 60  # of a curve


def trained_tokenizer(text: str, size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer on a text itself, with the report's tags as tokens.

    Args:
        text: a file or data set.
        size: how many tokens, at most.
    """
    documents = (
        document if isinstance(document, str) else "\n".join(turn["content"] for turn in document)
        for document in islice(read_texts(text), _DOCUMENTS)
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=_TAGS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    end = _TAGS[0]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


def section(scale: Scale, text: str, tokens: int | None, passes: int) -> Heal:
    """Return how a scale is trained: as the recipe, but for what differs in size.

    Args:
        scale: the scale.
        text: a file or data set.
        tokens: to train on, over all passes; None for all of the text.
        passes: over the text.
    """
    heal = Recipe.load("kphi3-3layer").heal
    assert heal is not None
    changes = {
        "data": text,
        "tokens": None if tokens is None else math.ceil(tokens / passes),
        "epochs": passes,
        "context_length": scale.context_length,
        "batch_size": scale.batch_size,
        "micro_batch": scale.batch_size,
        "held_out": scale.held_out,
    }
    return heal.model_copy(update=changes)


def train(
    row: Row,
    seed: int,
    rate: float,
    heal: Heal,
    text: HealingText,
    tokenizer: Any,
    work: Path | None,
) -> dict[str, Any]:
    """Train one row once, and return what came of it as JSON values.

    Args:
        row: which model.
        seed: of its weights.
        rate: learning rate.
        heal: how to train.
        text: the rows, one pass of them.
        tokenizer: names tokens.
        work: keeps the training while it lasts, and the model it comes to; None for neither.
    """
    vocabulary = max(row.scale.vocabulary, len(tokenizer))
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos")}
    model = row.model(row.config(vocabulary, **ends), seed)
    steps = heal.epochs * math.ceil(len(text.train) / heal.batch_size)
    changes = {"learning_rate": rate, "evaluate_every": math.ceil(steps / _MEASURED)}
    out = None if work is None else work / f"{row.name}-seed{seed}-rate{rate:g}"
    begun = time.perf_counter()
    report = llmslim.heal(
        model,
        out,
        # The tokens are counted out already: what is left is whole passes.
        recipe=heal.model_copy(update={**changes, "tokens": None}),
        data=text,
        tokenizer=None if out is None else tokenizer,  # kept beside the model
        resume=out is not None and folder_beside(out).exists(),
        overwrite=out is not None and out.exists(),
    )
    seconds = time.perf_counter() - begun
    steps_taken = [line for line in report.history if "loss" in line]
    measured = [line for line in report.history if "held_out_loss" in line]
    last = max(1, len(steps_taken) // 10)
    return {
        "row": row.name,
        "seed": seed,
        "rate": rate,
        "layers": row.layers,
        "intermediate": row.intermediate,
        "parameters": row.parameters,
        "train_loss": statistics.fmean(line["loss"] for line in steps_taken[-last:]),
        "validation_loss": measured[-1]["held_out_loss"],
        "tokens": steps_taken[-1]["tokens"],
        "tokens_per_second": report.tokens_per_second,
        "seconds": round(seconds, 1),
        "curve": _curve(steps_taken),
        "notes": list(report.notes),
    }


def _curve(steps: list[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return tokens seen and loss, averaged over stretches of the training."""
    size = math.ceil(len(steps) / _POINTS)
    parts = [steps[start : start + size] for start in range(0, len(steps), size)]
    return [(p[-1]["tokens"], statistics.fmean(line["loss"] for line in p)) for p in parts]


def best_runs(runs: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return each row's runs at the rate whose mean validation loss is lowest."""
    by_rate: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for run in runs:
        by_rate.setdefault(run["row"], {}).setdefault(run["rate"], []).append(run)
    return {
        name: min(rates.values(), key=lambda some: _mean(some, "validation_loss"))
        for name, rates in by_rate.items()
    }


def best_rate(runs: Iterable[Mapping[str, Any]], row: Row) -> tuple[float]:
    """Return a row's best rate so far: the first seed tries all, the others take it."""
    return (best_runs(runs)[row.name][0]["rate"],)


def table(runs: Iterable[Mapping[str, Any]], rows: Mapping[str, Row]) -> str:
    """Return the table of all runs in Markdown.

    Args:
        runs: from `train`.
        rows: in the table's order; rows without a run are left out.
    """
    best, dense = best_runs(runs), rows["phi3-2"].parameters
    header = ["row", "layers", "intermediate", "non-embedding parameters", "of dense", "rate"]
    header += ["train loss", "validation loss", "tokens/s", "seconds", "seeds"]
    lines = [
        [
            name,
            str(row.layers),
            f"{row.intermediate:,}",
            f"{row.parameters:,}",
            f"{100 * row.parameters / dense:.1f} %",
            f"{best[name][0]['rate']:g}",
            _spread(best[name], "train_loss"),
            _spread(best[name], "validation_loss"),
            f"{_mean(best[name], 'tokens_per_second'):,.0f}",
            f"{_mean(best[name], 'seconds'):,.0f}",
            str(len(best[name])),
        ]
        for name, row in rows.items()
        if name in best
    ]
    return markdown(header, lines)


def _mean(runs: Iterable[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def _spread(runs: list[Mapping[str, Any]], key: str) -> str:
    """Write a mean, and the standard deviation where there are several seeds."""
    values = [run[key] for run in runs]
    more = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{more}"


def draw(runs: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draw each row's training loss at its best rate, first seed; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        click.echo("no picture: matplotlib is not installed", err=True)
        return
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for name, some in best_runs(runs).items():
        (line,) = axes.plot(*zip(*some[0]["curve"], strict=True), label=name, linewidth=1)
        at, loss = some[0]["tokens"], some[0]["validation_loss"]
        axes.plot([at], [loss], marker="o", color=line.get_color())
    axes.set_xlabel("tokens")
    axes.set_ylabel("training loss; dots: validation loss at the end")
    axes.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})


def _chosen(names: str, rows: Mapping[str, Row]) -> list[Row]:
    """Return the rows of a list of names.

    Raises:
        BadParameter: if one is unknown.
    """
    wanted = {"report": list(REPORT), "all": list(rows)}.get(names, names.split(","))
    if unknown := set(wanted) - set(rows):
        raise click.BadParameter(
            f"{', '.join(sorted(unknown))}; allowed report, all, or some of {', '.join(rows)}."
        )
    return [rows[name] for name in wanted]


def _kept(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the runs that a file holds already.

    Raises:
        UsageError: if it is of other settings.
    """
    if not path.exists():
        return []
    data = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key, value in settings.items() if data["settings"].get(key) != value]
    if changed:
        raise click.UsageError(f"{path}: made with other {', '.join(changed)}. Name another file.")
    runs: list[dict[str, Any]] = data["runs"]
    return runs


def _show(path: Path, runs: list[dict[str, Any]], rows: Mapping[str, Row], about: str) -> None:
    """Print the table, and write it and the picture beside the file of runs."""
    made = f"{about}\n\n{table(runs, rows)}\n"
    click.echo(made, nl=False)
    write_whole(path.with_suffix(".md"), made)
    draw(runs, path.with_suffix(".svg"))


def _rates(_: Any, __: Any, given: str | None) -> tuple[float, ...] | None:
    """Read learning rates.

    Raises:
        BadParameter: if one is no number above 0.
    """
    try:
        rates = None if given is None else tuple(map(float, given.split(",")))
    except ValueError as error:
        raise click.BadParameter(f"{given}; numbers with commas between.") from error
    if rates is not None and min(rates) <= 0:
        raise click.BadParameter(f"{given}; numbers above 0.")
    return rates


@click.command()
@click.option("--scale", "scale_name", type=click.Choice(list(SCALES)), default="tiny")
@click.option("--text", default="lamini", show_default=True, help="As `llmslim heal --data`.")
@click.option("--rows", "names", default="all", show_default=True, help="report, all, or a,b,c.")
@click.option("--rates", callback=_rates, help="Learning rates, such as 1e-3,3e-3.")
@click.option("--seeds", type=click.IntRange(min=1), help="How many times each row is trained.")
@click.option("--tokens", type=click.IntRange(min=1), help="To train on, over all passes.")
@click.option("--passes", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--tokenizer", "folder", help="Folder; trained on the text where not given.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for trainings and models.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Holds every run.")
@click.option("--resume", is_flag=True, help="Keep the runs that the JSON file holds.")
@click.option("--threads", type=int, help="Threads of torch; its own default otherwise.")
def main(
    scale_name: str,
    text: str,
    names: str,
    rates: tuple[float, ...] | None,
    seeds: int | None,
    tokens: int | None,
    passes: int,
    folder: str | None,
    work: Path | None,
    path: Path | None,
    resume: bool,
    threads: int | None,
) -> None:
    """Train rows of the table, print it, and save it.

    Raises:
        UsageError: if an option is missing, or a file is there that may not be continued.
    """
    set_up(threads)
    scale = SCALES[scale_name]
    rows = rows_of(scale)
    chosen = _chosen(names, rows)
    if scale_name == "full" and folder is None:
        raise click.UsageError("Give --tokenizer, a folder with Phi-3's: the report used that.")
    path = path or Path(f"kphi3-{scale_name}.json")
    if path.exists() and not resume:
        raise click.UsageError(f"{path} exists. Continue it with --resume, or name another file.")
    tokens = tokens or scale.tokens
    tokenizer = load_tokenizer(folder) if folder else trained_tokenizer(text, scale.vocabulary)
    heal = section(scale, text, tokens, passes)
    packed = healing_text(heal, tokenizer, context_length=heal.context_length)
    for note in packed.notes:
        click.echo(note, err=True)
    settings = {"scale": scale_name, "tokens": tokens, "passes": passes}
    settings["text"] = {"name": packed.source, "digest": text_digest(packed)}
    runs = _kept(path, settings)
    done = {(run["row"], run["seed"], run["rate"]) for run in runs}
    for seed in range(seeds or scale.seeds):
        for row in chosen:
            for rate in (rates or scale.rates) if seed == 0 else best_rate(runs, row):
                if (row.name, seed, rate) in done:
                    continue
                run = train(row, seed, rate, heal, packed, tokenizer, work)
                runs.append(run)
                write_whole(path, json.dumps({"settings": settings, "runs": runs}, indent=1))
                click.echo(
                    f"{row.name}, seed {seed}, rate {rate:g}: train {run['train_loss']:.3f}, "
                    f"validation {run['validation_loss']:.3f}, {run['seconds']:.0f} s",
                    err=True,
                )
    seen = f"{runs[0]['tokens']:,} tokens in {passes} passes"
    about = f"{scale_name}, {packed.source}, {seen}; {machine()}"
    _show(path, runs, rows, about)


if __name__ == "__main__":
    main()
