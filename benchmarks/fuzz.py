"""Throw thousands of damaged and hostile files at the functions that check them.

    python benchmarks/fuzz.py [--cases 20000] [--seed 0] [--kind header]

Recipes, headers of safetensors and GGUF files, index files and configs, changed at random
(tests/hostile_files.py). Each must be refused by an error of llmslim's own, or accepted and read
the same way by who comes next; anything else is printed with what repeats it, and the exit status
is 1. So is a case that takes longer than `--slow` seconds.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import click

os.environ["HF_HUB_OFFLINE"] = "1"  # a hostile name must not reach the network
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hostile_files import KINDS, outcome

SHARES = {"recipe": 0.25, "header": 0.3, "index": 0.2, "config": 0.1, "gguf": 0.15}
_MOST_SHOWN = 10


@click.command()
@click.option("--cases", default=20_000, show_default=True, help="How many, over all kinds.")
@click.option("--seed", default=0, show_default=True)
@click.option("--kind", type=click.Choice(list(KINDS)), help="One kind only.")
@click.option("--case", "only", type=int, help="One case only, by its number: what to debug.")
@click.option("--slow", default=5.0, show_default=True, help="Seconds that no case may take.")
def command(cases: int, seed: int, kind: str | None, only: int | None, slow: float) -> None:
    """Run the cases and print how many ended how."""
    shares = {kind: 1.0} if kind else SHARES
    faults = 0
    started = time.perf_counter()
    click.echo("| kind | cases | accepted | refused | escaped | slowest, s | all, s |")
    click.echo("|---|---|---|---|---|---|---|")
    for name, share in shares.items():
        counts: Counter[str] = Counter()
        slowest = 0.0
        begun = time.perf_counter()
        numbers = range(round(cases * share)) if only is None else [only]
        for number in numbers:
            taken, ended = _one(name, seed, number)
            counts[ended] += 1
            slowest = max(slowest, taken)
            if (ended == "escaped" or taken > slow) and (faults := faults + 1) <= _MOST_SHOWN:
                again = f"--seed {seed} --kind {name} --case {number}"
                click.echo(f"{ended} after {taken:.1f} s: {again}", err=True)
        refused = len(numbers) - counts["accepted"] - counts["escaped"]
        took = time.perf_counter() - begun
        click.echo(
            f"| {name} | {len(numbers)} | {counts['accepted']} | {refused} | {counts['escaped']} "
            f"| {slowest:.2f} | {took:.0f} |"
        )
    click.echo(f"\n{time.perf_counter() - started:.0f} s, seed {seed}; {faults} faults")
    sys.exit(faults > 0)


def _one(kind: str, seed: int, number: int) -> tuple[float, str]:
    """Return how long a case took and how it ended; the traceback of one that escaped is shown."""
    started = time.perf_counter()
    with TemporaryDirectory(prefix="fuzz-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ended = outcome(kind, Random(f"{seed} {kind} {number}"), Path(folder))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            traceback.print_exc(limit=-4)
            ended = "escaped"
    return time.perf_counter() - started, ended


if __name__ == "__main__":
    command()
