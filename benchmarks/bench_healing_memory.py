"""Peak memory of healing: measured on a CPU, next to what `llmslim heal --dry-run` works out.

    python benchmarks/bench_healing_memory.py --data rows.parquet --model SLIM [--model FOLDER ...]
        [--teacher FOLDER] [--length 512] [--steps 2] [--threads 1]

Every healing is a process of its own: all parameters, float32, one pass a step, so that the two
figures are of the same thing. Measured is the highest resident size of the process without what it
had before it loaded the model (Python and its libraries, the text), and the C library is told to
give freed memory back. Two steps at least: the optimiser has its moments only after the first.

With `--config CONFIG --recipe NAME` it prints what the recipe's healing takes on a GPU of that
model in bfloat16, computed alone, and needs no weights.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import torch
from _common import find, machine, markdown, read_tokenizer, set_up

import llmslim
from llmslim.data.healing import healing_text
from llmslim.healing.memory import healing_memory
from llmslim.recipe import Heal, Recipe
from llmslim.report.wording import size
from llmslim.storage.load import load_model
from llmslim.storage.source import empty_model, open_source


def resident() -> int:
    """Return the bytes this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def measure(model: str, teacher: str | None, spec: Heal, length: int, steps: int) -> dict[str, Any]:
    """Heal for a few steps; return the peak and what was computed before, in bytes."""
    source = find(model)
    rows = spec.micro_batch
    wanted = {"batch_size": rows, "tokens": steps * rows * length, "patience": None, "held_out": 8}
    spec = spec.model_copy(update=wanted)
    text = healing_text(spec, read_tokenizer(source), teacher=None, context_length=length)
    before = resident()
    loaded = load_model(source, dtype="float32")
    dense = None if teacher is None else load_model(find(teacher), dtype="float32")
    computed = healing_memory(
        loaded,
        spec,
        length=length,
        accumulate=1,
        bf16=False,
        device=loaded.device,
        teacher=dense,
    )
    llmslim.heal(loaded, recipe=spec, data=text, teacher=dense)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"measured": peak - before, "computed": computed.peak, "process": before}


def on_a_gpu(config: str, recipe: str) -> None:
    """Print what a recipe's healing takes in bfloat16, part by part."""
    made = Recipe.load(recipe)
    spec = made.heal or Heal()
    source = open_source(config, weights=False)
    model = empty_model(source.config, source.given)
    llmslim.slim(model, made, init="random")
    found = healing_memory(
        model,
        spec,
        length=spec.context_length,
        accumulate=-(-spec.batch_size // spec.micro_batch),
        bf16=True,
        device=torch.device("cuda"),
    )
    click.echo(markdown([f"{recipe}, context {spec.context_length}", ""], found.facts()))


@click.command()
@click.option("--data", help="As `llmslim heal --data`.")
@click.option("--model", "models", multiple=True, help="Folder; may be given more than once.")
@click.option("--teacher", help="Folder of the dense model, for one more row of each model.")
@click.option("--length", default=512, show_default=True, help="Context, in tokens.")
@click.option("--steps", default=2, show_default=True)
@click.option("--threads", type=int, help="Threads of torch; its own default otherwise.")
@click.option("--config", help="Folder with a config.json, for --recipe.")
@click.option("--recipe", help="What is to be healed on a GPU.")
@click.option("--one", hidden=True, help="Rows, checkpointing and teacher of one process.")
def main(
    data: str | None,
    models: tuple[str, ...],
    teacher: str | None,
    length: int,
    steps: int,
    threads: int | None,
    config: str | None,
    recipe: str | None,
    one: str | None,
) -> None:
    """Print a table.

    Raises:
        UsageError: if there is no text to train on.
    """
    set_up(threads)
    if config and recipe:
        on_a_gpu(config, recipe)
    if not models:
        return
    if data is None:
        raise click.UsageError("Give --data, text to train on.")
    if one is not None:
        rows, checkpointing, taught = json.loads(one)
        spec = Heal(
            data=data,
            train="all",
            micro_batch=rows,
            gradient_checkpointing=checkpointing,
            precision="fp32",
        )
        found = measure(models[0], teacher if taught else None, spec, length, steps)
        click.echo(json.dumps(found))
        return
    click.echo(f"{machine()}; context {length}, {torch.get_num_threads()} thread(s)\n")
    table = []
    cases = [(*case, False) for case in itertools.product((1, 4), (False, True))]
    if teacher is not None:
        cases.append((1, False, True))
    for model, case in itertools.product(models, cases):
        command = [sys.executable, __file__, "--data", data, "--model", model]
        command += ["--length", str(length), "--steps", str(steps), "--one", json.dumps(case)]
        command += ["--threads", str(threads)] if threads else []
        command += ["--teacher", teacher] if teacher else []
        # glibc keeps what is freed for later unless it was large, and "large" grows as it goes.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
        said = subprocess.check_output(command, text=True, env=environment)
        found = json.loads(said.splitlines()[-1])
        rows, checkpointing, taught = case
        table.append(
            [
                Path(model).name,
                str(rows),
                "yes" if checkpointing else "no",
                "yes" if taught else "no",
                size(found["measured"]),
                size(found["computed"]),
                f"{found['computed'] / found['measured']:.2f}",
            ]
        )
        click.echo(" ".join(table[-1]), err=True)
    header = ["model", "rows", "checkpointing", "teacher", "measured", "computed", "ratio"]
    click.echo(markdown(header, table))


if __name__ == "__main__":
    main()
