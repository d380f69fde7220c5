"""Try every change on every architecture, and judge what is written by what it computes.

    python benchmarks/sweep.py [--only 'qwen*'] [--change 'depth*'] [--jobs 1]
        [--json sweep.json] [--resume] [--again] >> docs/architectures.md

Each architecture of transformers' causal and image-text-to-text mappings is built tiny, with six
layers, and so are configs that tell kinds of layers by counters and indices (tests/six_layers.py).
Each change is made two ways: `slim` and `save_pretrained`, and `convert`. Three outcomes are right:

- *same*: what was written loads, without a weight left over or drawn at random, and computes what
  `slim` left in memory, with a cache too. That in turn computes what is true where the truth is
  known: with fewer layers alone, what the dense model does whose other layers let the hidden states
  through (`_truth.py`); with more neurons, what the dense model does.
- *refused*: `plan` says why not, and so do `slim` and `convert`, before anything is written.
- *not judged*: transformers itself builds no such model, or does not load back what it saves.

Everything else is a fault: a difference, an error after the plan, an error of another class.
The exit status is 1 if there is one. Printed is a section of docs/architectures.md; `--json` holds
every case with its difference in standard deviations of the logits, and is what `--resume` goes on
from. Less than a second a case; nothing is downloaded.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import click
import torch
import transformers
from _common import machine, markdown
from _judge import CHANGES, WAYS, Bench, Case, TooLong, limit, short
from six_layers import Subject, subjects

from llmslim.atomic import write_whole


def try_subject(subject: Subject, changes: list[str], seconds: float) -> list[Case]:
    """Make changes to one architecture, each by itself; never raises."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found: list[Case] = []
    with TemporaryDirectory(prefix="llmslim-sweep-") as folder, redirect_stdout(sys.stderr):
        bench = Bench(subject, Path(folder))
        try:
            with limit(3 * seconds):
                why = bench.set_up()
        except TooLong:
            why = f"no tiny model within {3 * seconds:.0f} s"
        for change in changes:
            if why:
                both = [Case(subject.name, change, way, "not judged", why) for way in WAYS]
            else:
                both = _judge(bench, change, seconds)
            found += both
    gc.collect()  # once: a model is a web of references, and looking through all takes long
    return found


def _judge(bench: Bench, change: str, seconds: float) -> list[Case]:
    try:
        with limit(seconds):
            return bench.judge(change)
    except TooLong:
        text = f"took longer than {seconds:.0f} s"
    except Exception as error:
        text = f"{type(error).__name__}: {short(error)}"
    return [Case(bench.subject.name, change, way, "fault", text, None) for way in WAYS]


def document(cases: list[Case]) -> str:
    """Return all cases as a section of docs/architectures.md."""
    by_name: dict[str, dict[str, list[Case]]] = {}
    for case in cases:
        by_name.setdefault(case.architecture, {}).setdefault(case.change, []).append(case)
    changes = [change for change in CHANGES if any(change in row for row in by_name.values())]
    kinds = {subject.name: subject.kind for subject in subjects()}
    rows, unjudged = [], []
    for name, row in sorted(by_name.items()):
        every = [case for both in row.values() for case in both]
        if {case.outcome for case in every} == {"not judged"}:
            unjudged.append([kinds.get(name, ""), f"`{name}`", every[0].detail])
        else:
            cells = [_cell(row.get(change, [])) for change in changes]
            rows.append([kinds.get(name, ""), f"`{name}`", *cells])
    refused = Counter(_anonymous(c.detail) for c in cases if c.outcome == "refused")
    faults = [
        [f"`{c.architecture}`", f"{c.change}, {c.way}", _what_it_was(c)]
        for c in cases
        if c.outcome == "fault"
    ]
    counts = Counter(case.outcome for case in cases)
    parts = [
        HEAD.format(
            models=len(rows),
            cases=len(cases),
            counts=", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()),
            known=sum(case.truth is not None and case.way == "save" for case in cases),
            exact=sum(case.difference == 0 for case in cases),
            machine=machine(),
        ),
        markdown(["Kind", "Model", *changes], rows),
    ]
    if refused:
        reasons = [[str(count), text] for text, count in refused.most_common()]
        parts += ["What `plan` says where it refuses:", markdown(["Cases", "Why"], reasons)]
    if unjudged:
        parts += ["Not judged:", markdown(["Kind", "Model", "Why"], unjudged)]
    if faults:
        parts += ["Faults:", markdown(["Model", "Change and way", "What"], faults)]
    return "\n\n".join(parts)


HEAD = """## Every change, made and read back

Each kind of change on tiny random models of six layers, made with `slim` and `save_pretrained` and
with `convert`. *same*: what was written loads whole and computes what `slim` left in memory, and
that in turn, with fewer layers alone, what the dense model does whose other layers are skipped, and
with more neurons, what the dense model does. *refused*: `plan` says why not, before anything is
written. Where both ways differ, `slim` stands first. Models with fields after their name are
configs in which the kind of a layer depends on counters or indices (`tests/six_layers.py`).

{models} models, {cases} cases: {counts}. {exact} are bitwise the same; {known} were held against a
truth. Made by `python benchmarks/sweep.py >> docs/architectures.md` ({machine})."""


def _anonymous(text: str) -> str:
    """Leave out of a refusal what only one model has: classes and layers."""
    text = re.sub(r"\b\w+(For[A-Z]|LMHead|Decoder)\w*", "the model", text)
    return re.sub(r"(\.|\blayers )\d+\b", r"\1N", text)


def _cell(both: list[Case]) -> str:
    """Write both ways in one cell, once where they agree."""
    outcomes = ["**FAULT**" if case.outcome == "fault" else case.outcome for case in both]
    return " / ".join(dict.fromkeys(outcomes))


@click.command()
@click.option("--only", multiple=True, help="Glob on a model type or a model's name; repeatable.")
@click.option("--kind", type=click.Choice(["causal", "image"]), help="Of one mapping only.")
@click.option("--change", multiple=True, help="Glob on a change's name; repeatable.")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write every case to it.")
@click.option("--resume", is_flag=True, help="Keep what the JSON holds; try the rest.")
@click.option("--again", is_flag=True, help="Of what the JSON holds, try the faults again.")
@click.option("--limit", "seconds", default=30.0, show_default=True, help="Seconds for a change.")
def main(
    only: tuple[str, ...],
    kind: str | None,
    change: tuple[str, ...],
    jobs: int,
    path: Path | None,
    resume: bool,
    again: bool,
    seconds: float,
) -> None:
    """Try every change on every architecture; exit with 1 if one has a fault."""
    wanted = [name for name in CHANGES if not change or any(fnmatchcase(name, g) for g in change)]
    cases: dict[tuple[str, str, str], Case] = {}
    if (resume or again) and path is not None and path.exists():
        known = [Case(**row) for row in json.loads(path.read_text(encoding="utf-8"))["cases"]]
        # Both ways of a change are tried together.
        faulty = {(one.architecture, one.change) for one in known if one.outcome == "fault"}
        for case in known:
            if not (again and (case.architecture, case.change) in faulty):
                cases[case.architecture, case.change, case.way] = case
    done = {key[:2] for key in cases}
    todo = []
    for subject in subjects(only):
        left = [name for name in wanted if (subject.name, name) not in done]
        if left and kind in (None, subject.kind):
            todo.append((subject, left))
    for number, found in enumerate(_run(todo, jobs, seconds), 1):
        cases |= {(case.architecture, case.change, case.way): case for case in found}
        counts = Counter(case.outcome for case in found)
        text = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        click.echo(f"{number}/{len(todo)} {found[0].architecture}: {text}", err=True)
        for case in found:
            if case.outcome == "fault":
                click.echo(f"    {case.change}, {case.way}: {_what_it_was(case)}", err=True)
        if path is not None:
            _write(path, list(cases.values()))
    shown = sorted(cases.values(), key=lambda case: (case.architecture, CHANGES.index(case.change)))
    click.echo(document(shown))
    sys.exit(1 if any(case.outcome == "fault" for case in shown) else 0)


def _what_it_was(case: Case) -> str:
    far = "" if case.difference is None else f", {case.difference:.2g} sd"
    off = "" if case.truth is None else f", {case.truth:.2g} sd from the truth"
    return f"{case.detail}{far}{off}"


def _run(todo: list[tuple[Subject, list[str]]], jobs: int, seconds: float) -> Iterator[list[Case]]:
    """Yield the cases of each subject, in this process or in others."""
    if jobs == 1:
        for subject, changes in todo:
            yield try_subject(subject, changes, seconds)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(try_subject, *each, seconds) for each in todo]
        for future in as_completed(waiting):
            yield future.result()


def _write(path: Path, cases: list[Case]) -> None:
    data = {"machine": machine(), "cases": [asdict(case) for case in cases]}
    write_whole(path, json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
