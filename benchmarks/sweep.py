"""Try every change on every architecture, and judge what is written by what it computes.

    python benchmarks/sweep.py [--only 'qwen*'] [--change 'depth*'] [--jobs 1]
        [--json sweep.json] [--resume] [--again] > sweep.md

Each architecture of transformers' causal and image-text-to-text mappings is built tiny, with six
layers, and so are configs that tell kinds of layers by counters and indices (tests/six_layers.py).
Each change is made two ways: `slim` and `save_pretrained`, and `convert`. Three outcomes are right:

- *same*: what was written loads, without a weight left over or drawn at random, and computes what
  `slim` left in memory. That in turn computes what is true where the truth is known: with fewer
  layers alone, what the dense model does whose other layers let the hidden states through
  (`_truth.py`); with more neurons, what the dense model does.
- *refused*: `plan` says why not, and so do `slim` and `convert`, before anything is written.
- *not judged*: transformers itself builds no such model, or does not load back what it saves.

Everything else is a fault: a difference, an error after the plan, an error of no class of llmslim's.
The exit status is 1 if there is one. Printed is a table, for docs/architectures.md; `--json` holds
every case with its difference in standard deviations of the logits, and is what `--resume` goes on
from. About a second a case; nothing is downloaded.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]
import click
import torch
import transformers
from _common import machine, markdown
from _truth import Truth, UndefinedError, difference
from every_architecture import MLP_AND_ATTENTION
from six_layers import LAYERS, Subject, inputs, subjects
from torch import Tensor

import llmslim
from llmslim import SlimError, surgery
from llmslim.surgery.sites import find_layers, find_mlps

SAME = 1e-5
"""Standard deviations of the logits by which a model that was written and loaded may differ."""
CLOSE = 1e-3
"""The same for more neurons: sums of other parts, in float32."""
_ROUGH = {"rwkv": 1e-3}
"""The same from what is true, by model type: RWKV halves its hidden states every few layers, which
only the epsilon of its norms can tell."""
_LARGEST = 60_000_000  # parameters: what none of the tiny sizes reached is no case of a second
_WAYS = ("save", "convert")
_FOLDER = re.compile(r"\S*llmslim-sweep-\w+/")


@dataclass(frozen=True)
class Case:
    """What became of one change, made one way."""

    architecture: str
    change: str
    way: str
    """`save`: slim and save_pretrained; `convert`."""
    outcome: str
    """same, refused, fault or not judged."""
    detail: str = ""
    difference: float | None = None
    """From what slim left in memory, in standard deviations of its logits."""
    truth: float | None = None
    """From what is true to what slim left in memory, where the truth is known."""
    seconds: float = 0.0


class TooLong(BaseException):
    """A case took longer than it may; no library's `except Exception` is to catch it."""


def recipes(model: Any, truth: Truth | None) -> dict[str, dict[str, Any]]:
    """Return every change by name: recipes for one model, read off its sizes."""
    path, count = ("*", LAYERS) if truth is None else (truth.path, len(truth.layers))
    try:
        mlps = find_mlps(model, find_layers(model))
    except (SlimError, AttributeError):
        mlps = []
    widths = {mlp.width for mlp in mlps} or {96}
    fewer, more = max(8, min(widths) // 2), max(widths) * 3 // 2
    inside = [
        f"{path}.{glob}" for rule in MLP_AND_ATTENTION.replace for glob in _globs(rule.match)
    ]
    structure = {"match": inside, "structure": "low_rank", "keep_ratio": 0.5}
    chosen = mlps[len(mlps) // 2] if mlps else None
    names = [f"{path}.1.*mlp*"] if chosen is None else [*chosen.up, chosen.down]
    narrow = {"match": names, "structure": "width", "keep_ratio": 0.5}
    few = max(1, round(count * 2 / 3))
    listed = [index for index in (1, 2, 4) if index < count]
    swapped = [3, 0] if count > 3 else [count - 1, 0]
    found: dict[str, dict[str, Any]] = {
        "depth, a count": {"depth": {"keep_layers": few}},
        "depth, a list": {"depth": {"keep_layers": listed}},
        "depth, reordered": {"depth": {"keep_layers": swapped}},
        "width, fewer": {"width": {"intermediate_size": fewer}},
        "width, more": {"width": {"intermediate_size": more}},
        "structure": {"replace": [structure]},
        "width of a layer": {"replace": [narrow]},
        "depth, width, structure": {
            "depth": {"keep_layers": few},
            "width": {"intermediate_size": fewer},
            "replace": [structure],
        },
    }
    return {name: {"name": "sweep", **recipe} for name, recipe in found.items()}


CHANGES = (
    *("depth, a count", "depth, a list", "depth, reordered", "width, fewer", "width, more"),
    *("structure", "width of a layer", "depth, width, structure"),
)


def _globs(match: str | list[str]) -> list[str]:
    return [match] if isinstance(match, str) else match


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return what a model says of a few tokens."""
    found: Tensor = model(**inputs(model), use_cache=False).logits
    return found.float()


class Bench:
    """One architecture, written dense to a folder, to be changed again and again."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject, self.folder, self.dense = subject, folder, folder / "dense"

    def set_up(self) -> str:
        """Build the model and write it; return why it cannot be judged, if so."""
        try:
            model = self.subject.model()
            size = sum(p.numel() for p in model.parameters())
            if size > _LARGEST:
                return f"the tiny model has {size / 1e6:.0f}M parameters"
            model.save_pretrained(self.dense)
            built = logits(model)
            loaded, info = self._load(self.dense)
            self.truth_logits = logits(loaded)
        except Exception as error:
            return f"no tiny model: {type(error).__name__}: {_short(error)}"
        if not bool(built.isfinite().all()):
            return "the tiny model's logits are not finite"
        self.known = {key for keys in info.values() for key in keys}
        if self.known or difference(self.truth_logits, built) > SAME:
            return "transformers does not load back what it saves of it"
        try:
            self.truth: Truth | None = Truth(loaded, logits)
        except UndefinedError:
            self.truth = None
        self.recipes = recipes(model, self.truth)
        return ""

    def judge(self, change: str) -> list[Case]:
        """Make one change both ways."""
        name, recipe = self.subject.name, self.recipes[change]
        begun = time.perf_counter()
        model = self._load(self.dense)[0]
        found: list[Case] = []
        self.memory: Tensor | None = None
        self.off: float | None = None
        for way, given in (("save", model), ("convert", self.dense)):
            refused = _refusal(lambda it=given: llmslim.plan(it, recipe))
            case = self._way(way, model, recipe, refused, change)
            took = time.perf_counter() - begun
            found.append(Case(name, change, way, **case, seconds=round(took, 2)))
            begun = time.perf_counter()
        return found

    def _way(
        self, way: str, model: Any, recipe: dict[str, Any], refused: str | None, change: str
    ) -> dict[str, Any]:
        """Make a change one way, as its plan said or did not say, and judge what came of it."""
        out = self.folder / way
        shutil.rmtree(out, ignore_errors=True)

        def make() -> None:
            if way == "convert":
                llmslim.convert(self.dense, recipe, out)
            else:
                llmslim.slim(model, recipe)
                model.save_pretrained(out)

        if refused is not None and refused.startswith("!"):
            return _fault(f"plan: {refused[1:]}")
        if refused is not None:
            late = _refusal(make)
            if late is None or late.startswith("!") or out.exists():
                return _fault(f"plan refuses, {way} does not: {refused}")
            return {"outcome": "refused", "detail": refused}
        try:
            make()
        except Exception as error:
            return _fault(f"error after the plan: {type(error).__name__}: {_short(error)}")
        if way == "save":
            try:
                self.memory = logits(model)
                self.off = self._off(change, recipe)
            except Exception as error:
                return _fault(f"slim in memory: {type(error).__name__}: {_short(error)}")
        return self._read_back(out, change)

    def _read_back(self, out: Path, change: str) -> dict[str, Any]:
        try:
            loaded, info = self._load(out)
        except Exception as error:
            return _fault(f"does not load: {type(error).__name__}: {_short(error)}")
        odd = {what: sorted(keys) for what, keys in info.items() if keys}
        if odd:
            told = ", ".join(f"{len(keys)} {what.replace('_', ' ')}" for what, keys in odd.items())
            first = next(iter(odd.values()))[0]
            return _fault(f"loads with {told} ({first})")
        if self.memory is None:
            return _fault("there is nothing in memory to hold it against")
        try:
            differs = difference(logits(loaded), self.memory)
        except Exception as error:
            return _fault(f"loads, does not run: {type(error).__name__}: {_short(error)}")
        measured = {"difference": differs, "truth": self.off}
        if differs > SAME:
            return {**_fault("computes something else than slim in memory"), **measured}
        wider = change == "width, more"
        near = CLOSE if wider else _ROUGH.get(self.subject.model_type, SAME)
        if self.off is not None and self.off > near:
            what = "the dense model" if wider else "the kept layers"
            return {**_fault(f"slim in memory is not what {what} computed"), **measured}
        return {"outcome": "same", **measured}

    def _off(self, change: str, recipe: dict[str, Any]) -> float | None:
        """Return how far what slim left is from what is true, None where that is not known."""
        assert self.memory is not None
        if change == "width, more":
            return difference(self.memory, self.truth_logits)
        if not change.startswith("depth") or len(recipe) > 2 or self.truth is None:
            return None
        keep = recipe["depth"]["keep_layers"]
        if isinstance(keep, int):
            made = surgery.plan(self._load(self.dense)[0], llmslim.Recipe.of(recipe))
            keep = made.keep_layers
        try:
            way = self.truth.skipping if list(keep) == sorted(keep) else self.truth.in_order
            return difference(self.memory, way(keep))
        except UndefinedError:
            return None

    def _load(self, folder: Path) -> tuple[Any, dict[str, set[str]]]:
        loaded, info = self.subject.auto.from_pretrained(folder, output_loading_info=True)
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        return loaded.eval(), {kind: {str(key) for key in info.get(kind, ())} for kind in kinds}


def _refusal(call: Callable[[], Any]) -> str | None:
    """Return why a call was refused, None if it was not; an error of another class begins with !."""
    try:
        call()
    except SlimError as error:
        return _short(error)
    except Exception as error:
        return f"!{type(error).__name__}: {_short(error)}"
    return None


def _fault(detail: str) -> dict[str, Any]:
    return {"outcome": "fault", "detail": detail}


def _short(error: BaseException) -> str:
    told = " ".join((str(error).strip().splitlines() or [""])[0].split())
    return _FOLDER.sub("", told).replace("|", "/")[:200]


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise TooLong in what is inside once it has taken too long."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TooLong

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def try_subject(subject: Subject, changes: list[str], seconds: float) -> list[Case]:
    """Make changes to one architecture, each by itself; never raises."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
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
                both = [Case(subject.name, change, way, "not judged", why) for way in _WAYS]
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
        told = f"took longer than {seconds:.0f} s"
    except Exception as error:
        told = f"{type(error).__name__}: {_short(error)}"
    return [Case(bench.subject.name, change, way, "fault", told, None) for way in _WAYS]


def table(cases: list[Case]) -> str:
    """Return a row for every architecture and a column for every change, both ways in each cell."""
    by_name: dict[str, dict[str, list[Case]]] = {}
    for case in cases:
        by_name.setdefault(case.architecture, {}).setdefault(case.change, []).append(case)
    changes = [change for change in CHANGES if any(change in row for row in by_name.values())]
    rows = [
        [f"`{name}`", *(_cell(row.get(change, [])) for change in changes)]
        for name, row in by_name.items()
        if any(case.outcome != "not judged" for both in row.values() for case in both)
    ]
    reasons = Counter(
        f"{case.outcome}: {case.detail}" for case in cases if case.outcome in ("fault", "refused")
    )
    notes = {
        name: next(case.detail for both in row.values() for case in both)
        for name, row in by_name.items()
        if all(case.outcome == "not judged" for both in row.values() for case in both)
    }
    parts = [markdown(["Model", *changes], rows)]
    if reasons:
        shown = [[str(count), told] for told, count in reasons.most_common()]
        parts.append(markdown(["Cases", "Outcome"], shown))
    if notes:
        parts.append(markdown(["Not judged", "Why"], [[f"`{k}`", v] for k, v in notes.items()]))
    return "\n\n".join(parts)


def _cell(both: list[Case]) -> str:
    """Write both ways in one cell, once where they agree."""
    told = []
    for case in both:
        if case.outcome == "fault":
            far = "" if case.difference is None else f" {case.difference:.2g}"
            told.append(f"**FAULT**{far}")
        elif case.outcome == "same":
            told.append("same" if not case.difference else f"{case.difference:.0e}")
        else:
            told.append(case.outcome)
    return " / ".join(dict.fromkeys(told))


@click.command()
@click.option("--only", multiple=True, help="Glob on a model type or a model's name; repeatable.")
@click.option("--change", multiple=True, help="Glob on a change's name; repeatable.")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write every case to it.")
@click.option("--resume", is_flag=True, help="Keep what the JSON holds; try the rest.")
@click.option("--again", is_flag=True, help="Of what the JSON holds, try the faults again.")
@click.option("--limit", "seconds", default=30.0, show_default=True, help="Seconds for a change.")
def main(
    only: tuple[str, ...],
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
        for row in json.loads(path.read_text(encoding="utf-8"))["cases"]:
            case = Case(**row)
            if not (again and case.outcome == "fault"):
                cases[case.architecture, case.change, case.way] = case
    done = {key[:2] for key in cases}
    todo = []
    for subject in subjects(only):
        left = [name for name in wanted if (subject.name, name) not in done]
        if left:
            todo.append((subject, left))
    for number, found in enumerate(_run(todo, jobs, seconds), 1):
        cases |= {(case.architecture, case.change, case.way): case for case in found}
        counts = Counter(case.outcome for case in found)
        told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        click.echo(f"{number}/{len(todo)} {found[0].architecture}: {told}", err=True)
        for case in found:
            if case.outcome == "fault":
                click.echo(f"    {case.change}, {case.way}: {_told(case)}", err=True)
        if path is not None:
            _write(path, list(cases.values()))
    shown = sorted(cases.values(), key=lambda case: (case.architecture, CHANGES.index(case.change)))
    click.echo(table(shown))
    counts = Counter(case.outcome for case in shown)
    click.echo(f"\n{machine()}; " + ", ".join(f"{n} {what}" for what, n in counts.most_common()))
    sys.exit(1 if counts["fault"] else 0)


def _told(case: Case) -> str:
    far = "" if case.difference is None else f", {case.difference:.2g} sd"
    off = "" if case.truth is None else f", {case.truth:.2g} sd from the truth"
    return f"{case.detail}{far}{off}"


def _run(
    todo: list[tuple[Subject, list[str]]], jobs: int, seconds: float
) -> Iterator[list[Case]]:
    """Yield the cases of each subject, in this process or in others."""
    if jobs == 1:
        for subject, changes in todo:
            yield try_subject(subject, changes, seconds)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(try_subject, *each, seconds) for each in copy.copy(todo)]
        for future in as_completed(waiting):
            yield future.result()


def _write(path: Path, cases: list[Case]) -> None:
    data = {"machine": machine(), "cases": [asdict(case) for case in cases]}
    half = path.with_suffix(".partial")
    half.write_text(json.dumps(data, indent=1), encoding="utf-8")
    half.replace(path)


if __name__ == "__main__":
    main()
