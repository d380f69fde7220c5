"""What healing brings back: objective x what is trained x rows of a step x learning rate x tokens.

    python benchmarks/bench_healing.py --data rows.parquet --slim FOLDER --teacher FOLDER
        [--tokens 65536 --tokens 262144] [--length 512] [--rows 1] [--learning-rate 3e-4]
        [--train all --train blocks] [--objective logits --objective cross_entropy]
        [--loss-on answers] [--test TEXT --test OTHER] [--folder HEALED] [--threads 1]

Every line starts from the same slim checkpoint, sees the same text in the same order, and is judged
on the same held-out text. The share of the gap is (before - after) / (before - dense) of the loss
in nats. Data has its own manner, which cross-entropy learns and the dense model never did, so its
share may be above one; the perplexity of other texts (`--test`), as multiples of the dense model's,
tells what became of all else. Tokens per second are those of training, padding not counted. Where
`--folder` keeps the healed models, the same command goes on after a kill.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import torch
from _common import find, first_windows, machine, markdown, number, perplexity, read_tokenizer
from torch import Tensor

import llmslim
from llmslim.report.read import read_report


@click.command()
@click.option("--slim", required=True, help="What `llmslim convert` wrote.")
@click.option("--teacher", required=True, help="The dense model.")
@click.option("--data", required=True, multiple=True, help="As `llmslim heal --data`; repeatable.")
@click.option("--tokens", "counts", multiple=True, default=[100_000], type=int, show_default=True)
@click.option("--length", default=512, show_default=True, help="Tokens of a packed row.")
@click.option("--rows", multiple=True, default=[1], show_default=True, help="Rows of one step.")
@click.option("--learning-rate", "rates", multiple=True, default=[3e-4], show_default=True)
@click.option("--held-out", default=50, show_default=True, help="Rows of the data to judge by.")
@click.option("--train", "trains", multiple=True, default=["all", "blocks", "lora"])
@click.option("--objective", "objectives", multiple=True, default=["cross_entropy", "logits"])
@click.option("--loss-on", default="answers", show_default=True, help="As in a recipe.")
@click.option("--test", "tests", multiple=True, help="Text to score afterwards; repeatable.")
@click.option("--windows", "count", default=16, show_default=True, help="Windows of each text.")
@click.option("--folder", type=Path, help="Keeps the healed models; a temporary one by default.")
@click.option("--threads", type=int, help="Threads of torch; its own default otherwise.")
def main(
    slim: str,
    teacher: str,
    data: tuple[str, ...],
    counts: tuple[int, ...],
    length: int,
    rows: tuple[int, ...],
    rates: tuple[float, ...],
    held_out: int,
    trains: tuple[str, ...],
    objectives: tuple[str, ...],
    loss_on: str,
    tests: tuple[str, ...],
    count: int,
    folder: Path | None,
    threads: int | None,
) -> None:
    """Print a table."""
    if threads is not None:
        torch.set_num_threads(threads)
    tokenizer = read_tokenizer(find(teacher))
    texts = [first_windows(test, count, length, tokenizer) for test in tests]
    dense, before = (_scores(which, texts) for which in (teacher, slim))
    lines = [["dense", *[""] * 9, *map(number, dense), ""]]
    lines.append(["before", *[""] * 9, *_multiples(before, dense), ""])
    with ExitStack() as stack:
        kept = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for setting in itertools.product(counts, objectives, trains, rows, rates):
            tokens, objective, train, of_a_step, rate = setting
            out = kept / "-".join(map(str, setting))
            report = _heal(
                slim,
                out,
                data=list(data) if len(data) > 1 else data[0],
                teacher=teacher,
                train=train,
                tokens=tokens,
                learning_rate=rate,
                batch_size=of_a_step,
                settings={
                    "objective": objective,
                    "context_length": length,
                    "held_out": held_out,
                    "loss_on": loss_on,
                    "patience": None,
                },
            )
            gap = report["gap_closed"]
            lines.append(
                [
                    f"{tokens:,}",
                    objective,
                    train,
                    str(of_a_step),
                    f"{rate:g}",
                    f"{report['trained_parameters']:,}",
                    f"{report['loss_before']:.3f}",
                    f"{report['loss_after']:.3f}",
                    f"{report['loss_teacher']:.3f}",
                    "" if gap is None else f"{100 * gap:.1f} %",
                    *_multiples(_scores(out, texts), dense),
                    f"{report['tokens_per_second']:.0f}",
                ]
            )
            click.echo(" | ".join(lines[-1]), err=True)
    header = ["tokens", "objective", "trained", "rows", "rate", "parameters"]
    header += ["before", "after", "dense", "gap closed"]
    names = [Path(test).name for test in tests]
    click.echo(f"rows of {length} tokens; {machine()}\n")
    click.echo(markdown([*header, *names, "tokens/s"], lines))


def _heal(slim: str, out: Path, **options: Any) -> Mapping[str, Any]:
    """Heal, or continue, or do nothing where it was done; return what the report says of it."""
    if not out.exists():
        llmslim.heal(slim, out, resume=True, **options)
    found = read_report(out).healing
    assert found is not None  # `heal` has written it
    return found


def _scores(folder: str | Path, texts: list[Tensor]) -> list[float]:
    model = llmslim.load(folder, dtype="float32")
    return [perplexity(model, ids_NL) for ids_NL in texts]


def _multiples(scores: list[float], dense: list[float]) -> list[str]:
    return [f"{number(a)} ({a / b:.2f})" for a, b in zip(scores, dense, strict=True)]


if __name__ == "__main__":
    main()
