"""How fast a model generates, as numbers, and the file that keeps them beside a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmslim.atomic import write_whole
from llmslim.report import wording
from llmslim.report.kept import read_kept
from llmslim.storage import BENCHMARK


@dataclass(frozen=True)
class Speed:
    """Medians over the rounds, for rows of one length generated together."""

    batch: int
    """Rows generated together."""
    first_token_seconds: float
    """From the call to the first token of every row."""
    prefill: float
    """Tokens read per second, of all rows together."""
    decode: float
    """Tokens written per second after the first one, of all rows together."""
    memory: int
    """Bytes, see `Benchmark.memory_of`."""


@dataclass(frozen=True)
class Benchmark:
    """Speeds of a model, and of the dense one measured in turn with it."""

    model: str
    device: str
    """Its name; for processors with the number of threads."""
    dtype: str
    prompt: int
    """Tokens that each row begins with."""
    new_tokens: int
    """Tokens that are written in each row."""
    rounds: int
    memory_of: str
    """What the memory counts."""
    speeds: tuple[Speed, ...]
    against: str = ""
    dense: tuple[Speed, ...] = ()
    """The dense model's, for the same batches; empty where it was not measured."""
    ideal: float | None = None
    """How many times fewer weights a token is multiplied with than in the dense model: the
    speed-up to hope for. None where it is not known."""
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    """Of the libraries that the figures depend on."""

    def reached(self, speedup: float) -> float | None:
        """Return the share of the ideal gain that a speed-up is; negative where it is slower.

        Example:
            >>> found = Benchmark("m", "cpu", "float32", 8, 8, 3, "weights", (), ideal=3.0)
            >>> found.reached(2.0), found.reached(0.5)
            (0.5, -0.25)
        """
        if self.ideal is None or self.ideal <= 1:
            return None
        return (speedup - 1) / (self.ideal - 1)


@dataclass(frozen=True)
class SpeedRow:
    """One figure of one batch, written out for people."""

    batch: int
    name: str
    dense: str
    slim: str
    ratio: str
    """The slim model's as a multiple of the dense one's; empty without a dense model."""
    reached: str
    """Share of the ideal gain; empty where there is none."""
    worse: bool
    """Whether the dense model is better."""


def speed_rows(found: Benchmark) -> list[SpeedRow]:
    """Return the figures of a benchmark, four for each batch."""
    dense = {one.batch: one for one in found.dense}
    rows = []
    for ours in found.speeds:
        theirs = dense.get(ours.batch)
        for name, key, write, more in (
            ("prefill, tokens/s", "prefill", "{:,.1f}".format, True),
            ("decode, tokens/s", "decode", "{:,.1f}".format, True),
            ("first token, ms", "first_token_seconds", lambda s: f"{1000 * s:,.0f}", False),
            ("memory", "memory", wording.size, False),
        ):
            value = getattr(ours, key)
            if theirs is None:
                rows.append(SpeedRow(ours.batch, name, "", write(value), "", "", worse=False))
                continue
            ratio = value / getattr(theirs, key)
            share = found.reached(ratio) if more else None
            rows.append(
                SpeedRow(
                    ours.batch,
                    name,
                    write(getattr(theirs, key)),
                    write(value),
                    f"{ratio:.2f}x",
                    "" if share is None else f"{100 * share:.0f} %",
                    worse=ratio < 1 if more else ratio > 1,
                )
            )
    return rows


def headline(found: Benchmark) -> str:
    """Return what was measured, in a sentence."""
    rounds = "1 round" if found.rounds == 1 else f"{found.rounds} rounds"
    text = (
        f"{found.device}, {found.dtype}: {found.prompt} tokens read and {found.new_tokens} written "
        f"in each row, median of {rounds}"
    )
    return text + (f", in turn with {found.against}." if found.against else ".")


def explanation(found: Benchmark) -> str:
    """Return what the ideal and the memory are, in a sentence or two."""
    ideal = ""
    if found.dense and found.ideal is not None:
        ideal = (
            f"A token is multiplied with {found.ideal:.2f} times fewer weights than in the dense "
            "model; the share of that gain which is reached is 0 % at equal speed, and below 0 % "
            "where the model is slower. "
        )
    return f"{ideal}Memory: {found.memory_of}."


def read_benchmarks(folder: Path) -> tuple[Benchmark, ...]:
    """Return what is kept in a checkpoint's folder, one for each device and type.

    Raises:
        CheckpointError: if it is something else.
    """
    kind = tuple[Benchmark, ...]
    found: tuple[Benchmark, ...] | None = read_kept(folder / BENCHMARK, kind, "llmslim bench")
    return found or ()


def keep_benchmark(folder: Path, found: Benchmark) -> Sequence[Benchmark]:
    """Keep a benchmark in a checkpoint's folder, in place of one of the same device and type."""
    known = {(one.device, one.dtype): one for one in (*read_benchmarks(folder), found)}
    text = json.dumps([asdict(one) for one in known.values()], indent=2) + "\n"
    write_whole(folder / BENCHMARK, text)
    return tuple(known.values())
