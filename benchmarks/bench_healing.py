"""What healing brings back for the same tokens: objective x what is trained.

    python benchmarks/bench_healing.py --data rows.parquet --slim FOLDER --teacher FOLDER
        [--tokens 100000] [--length 512] [--learning-rate 3e-4] [--train all --train blocks]
        [--objective logits --objective cross_entropy] [--loss-on answers] [--test TEXT]
        [--threads 1]

Every row starts from the same slim checkpoint, sees the same text in the same order, and is judged
on the same held-out text. The share of the gap is (before - after) / (before - dense) of the loss
in nats. Data has its own manner, which cross-entropy learns and the dense model never did, so its
share may be above one; the perplexity of another text (`--test`) tells what became of all else.
Tokens per second are those of training, padding not counted.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import click
import torch
from _common import find, first_windows, machine, markdown, number, perplexity, read_tokenizer
from torch import Tensor

import llmslim


@click.command()
@click.option("--slim", required=True, help="What `llmslim convert` wrote.")
@click.option("--teacher", required=True, help="The dense model.")
@click.option("--data", required=True, help="As `llmslim heal --data`.")
@click.option("--tokens", default=100_000, show_default=True)
@click.option("--length", default=512, show_default=True, help="Tokens of a packed row.")
@click.option("--learning-rate", default=3e-4, show_default=True)
@click.option("--held-out", default=50, show_default=True, help="Rows of the data to judge by.")
@click.option("--train", "trains", multiple=True, default=["all", "blocks", "lora"])
@click.option("--objective", "objectives", multiple=True, default=["cross_entropy", "logits"])
@click.option("--loss-on", default="answers", show_default=True, help="As in a recipe.")
@click.option("--test", help="Text to score afterwards: .txt, .gz, .parquet …")
@click.option("--windows", "count", default=16, show_default=True, help="Windows of that text.")
@click.option("--threads", type=int, help="Threads of torch; its own default otherwise.")
def main(
    slim: str,
    teacher: str,
    data: str,
    tokens: int,
    length: int,
    learning_rate: float,
    held_out: int,
    trains: tuple[str, ...],
    objectives: tuple[str, ...],
    loss_on: str,
    test: str | None,
    count: int,
    threads: int | None,
) -> None:
    """Print a table."""
    if threads is not None:
        torch.set_num_threads(threads)
    ids_NL = None
    if test:
        ids_NL = first_windows(test, count, length, read_tokenizer(find(teacher)))
        scores = [number(_score(folder, ids_NL)) for folder in (teacher, slim)]
        click.echo(f"perplexity of {Path(test).name}: dense {scores[0]}, before {scores[1]}\n")
    rows = []
    for objective, train in itertools.product(objectives, trains):
        with tempfile.TemporaryDirectory() as folder:
            report = llmslim.heal(
                slim,
                Path(folder) / "healed",
                data=data,
                teacher=teacher,
                train=train,
                tokens=tokens,
                settings={
                    "objective": objective,
                    "context_length": length,
                    "learning_rate": learning_rate,
                    "held_out": held_out,
                    "loss_on": loss_on,
                    "patience": None,
                    "evaluate_every": tokens,  # more than there are steps: before and after
                },
            )
            after = "" if ids_NL is None else number(_score(Path(folder) / "healed", ids_NL))
        gap = report.gap_closed
        rows.append(
            [
                report.objective,
                train,
                f"{report.trained_parameters:,}",
                f"{report.loss_before:.3f}",
                f"{report.loss_after:.3f}",
                f"{report.loss_teacher:.3f}",
                "" if gap is None else f"{100 * gap:.1f} %",
                after,
                f"{report.tokens_per_second:.0f}",
            ]
        )
        click.echo(" | ".join(rows[-1]), err=True)
    header = ["objective", "trained", "parameters", "before", "after", "dense", "gap closed"]
    click.echo(f"{tokens:,} tokens; {machine()}\n")
    click.echo(markdown([*header, "perplexity after", "tokens/s"], rows))


def _score(folder: str | Path, ids_NL: Tensor) -> float:
    return perplexity(llmslim.load(folder, dtype="float32"), ids_NL)


if __name__ == "__main__":
    main()
