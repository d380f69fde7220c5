"""Make one change to one model, and judge what is written by what it computes: see sweep.py."""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from _truth import Truth, UndefinedError, difference
from every_architecture import MLP_AND_ATTENTION
from six_layers import LAYERS, Subject, inputs
from torch import Tensor

import llmslim
from llmslim import SlimError
from llmslim.anatomy.sites import find_layers, find_mlps

SAME = 1e-5
"""Standard deviations of the logits by which a model that was written and loaded may differ."""
CLOSE = 1e-3
"""The same for more neurons: sums of other parts, in float32."""
_ROUGH = {"rwkv": 1e-3}
"""The same from what is true, by model type: RWKV halves its hidden states every few layers, which
only the epsilon of its norms can tell."""
_LARGEST = 60_000_000  # parameters: what none of the tiny sizes reached is no case of a second
WAYS = ("save", "convert")
_FOLDER = re.compile(r"\S*llmslim-sweep-\w+/")


CHANGES = (
    *("depth, a count", "depth, a list", "depth, reordered", "width, fewer", "width, more"),
    *("structure", "width of a layer", "depth, width, structure"),
)


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
        f"{path}.{glob}" for rule in MLP_AND_ATTENTION.replace for glob in _globs(rule.match or [])
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


def _globs(match: str | list[str]) -> list[str]:
    return [match] if isinstance(match, str) else match


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return what a model says of a few tokens."""
    found: Tensor = model(**inputs(model), use_cache=False).logits
    return found.float()


@torch.no_grad()
def off_with_cache(model: Any) -> float | None:
    """Return how far the last tokens' logits are if those before are in a cache.

    The smallest difference of a few texts: sparse attention chooses among equal scores (DeepSeek
    V3.2's are often 0) by chance, while a cache that is wrong is wrong for every text.

    None where the model has no cache of the usual kind.
    """
    given = inputs(model)
    if set(given) != {"input_ids"}:
        return None
    found = []
    for shift in range(3):
        ids = given["input_ids"].roll(shift, 1)
        before, after = ids.split([8, 2], dim=1)
        try:
            cache = model(input_ids=before, use_cache=True).past_key_values
            cached = model(input_ids=after, past_key_values=cache, use_cache=True).logits
        except Exception:  # a state of another name, no cache at all
            return None
        whole = model(input_ids=ids, use_cache=False).logits
        found.append(difference(cached.float(), whole.float()[:, -2:]))
        if found[-1] <= CLOSE:
            break
    return min(found)


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
            return f"no tiny model: {type(error).__name__}: {short(error)}"
        if not bool(built.isfinite().all()):
            return "the tiny model's logits are not finite"
        self.known = {key for keys in info.values() for key in keys}
        if self.known or difference(self.truth_logits, built) > SAME:
            return "transformers does not load back what it saves of it"
        off = off_with_cache(loaded)
        self.caches = off is not None and off < CLOSE
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
        self.no_cache = False
        for way, given in (("save", model), ("convert", self.dense)):
            refused = _refusal(partial(llmslim.plan, given, recipe))
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
                report = llmslim.convert(self.dense, recipe, out).report
            else:
                report = llmslim.slim(model, recipe)
                model.save_pretrained(out)
            self.no_cache = any("use_cache=False" in note for note in report.problems)

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
            return _fault(f"error after the plan: {type(error).__name__}: {short(error)}")
        if way == "save":
            try:
                self.memory = logits(model)
                self.off = self._off(change, recipe)
            except Exception as error:
                return _fault(f"slim in memory: {type(error).__name__}: {short(error)}")
        return self._read_back(out, model, change)

    def _read_back(self, out: Path, model: Any, change: str) -> dict[str, Any]:
        try:
            loaded, info = self._load(out)
        except Exception as error:
            return _fault(f"does not load: {type(error).__name__}: {short(error)}")
        odd = {what: sorted(keys) for what, keys in info.items() if keys}
        if odd:
            text = ", ".join(f"{len(keys)} {what.replace('_', ' ')}" for what, keys in odd.items())
            first = next(iter(odd.values()))[0]
            return _fault(f"loads with {text} ({first})")
        if self.memory is None:
            return _fault("there is nothing in memory to hold it against")
        try:
            differs = difference(logits(loaded), self.memory)
            caches = self.caches and not self.no_cache  # where the report says so
            cached = [off_with_cache(each) for each in (model, loaded)] if caches else []
        except Exception as error:
            return _fault(f"loads, does not run: {type(error).__name__}: {short(error)}")
        measured = {"difference": differs, "truth": self.off}
        if differs > SAME:
            return {**_fault("computes something else than slim in memory"), **measured}
        wider = change == "width, more"
        near = CLOSE if wider else _ROUGH.get(self.subject.model_type, SAME)
        if self.off is not None and self.off > near:
            what = "the dense model" if wider else "the kept layers"
            return {**_fault(f"slim in memory is not what {what} computed"), **measured}
        if None in cached:
            return {**_fault("the dense model runs with a cache, this one does not"), **measured}
        if any(off > CLOSE for off in cached if off is not None):
            return {**_fault("computes something else with a cache"), **measured}
        return {"outcome": "same", **measured}

    def _off(self, change: str, recipe: dict[str, Any]) -> float | None:
        """Return how far what slim left is from what is true, None where that is not known."""
        assert self.memory is not None
        if change == "width, more":
            return difference(self.memory, self.truth_logits)
        if not change.startswith("depth") or len(recipe) > 2 or self.truth is None:
            return None
        keep = recipe["depth"]["keep_layers"]
        if isinstance(keep, int):  # spread evenly, both ends included
            step = (len(self.truth.layers) - 1) / max(1, keep - 1)
            keep = [int(index * step + 0.5) for index in range(keep)]
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
    """Return why a call was refused, None if it was not; errors of other classes begin with !."""
    try:
        call()
    except SlimError as error:
        return short(error)
    except Exception as error:
        return f"!{type(error).__name__}: {short(error)}"
    return None


def _fault(detail: str) -> dict[str, Any]:
    return {"outcome": "fault", "detail": detail}


def short(error: BaseException) -> str:
    text = " ".join((str(error).strip().splitlines() or [""])[0].split())
    return _FOLDER.sub("", text).replace("|", "/")[:200]


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
