"""Time every structure next to the dense projection, and next to what this machine allows.

    python benchmarks/bench_blocks.py [--model phi3] [--structure grouped_pointwise] [--rows 1]
        [--dtype bfloat16] [--training] [--compiled] [--device cuda] [--json blocks.json]

Each structure has about as many weights as kphi-3's grouped block of the same projection. Columns:

- share: of the speed-up that its share of the weights allows, dense seconds / seconds / (dense
  weights / weights). 1: a sixth of the weights takes a sixth of the time.
- floor: seconds that nothing on this machine could stay below, the larger of bytes over
  bandwidth (a copy of 256 MiB) and operations over rate (a product of 2,048 x 2,048 matrices of
  the same type), over the seconds measured. Weights that stay in a cache may be read faster.
- einsum: the seconds of the grouped block's formula as it is written, over its own.

Seconds are medians over interleaved rounds. Of each candidate there are so many copies, used in
turn, that weights come from memory as they do in a model, and not from a cache (one of each under
`--compiled`). `--training` adds the gradients of input and weights.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from _common import machine, markdown, set_up
from torch import Tensor, nn

from llmslim.modeling.structured import build, structure_class

SHAPES = {
    "phi3": [("qkv", 3072, 9216, 12), ("down", 8192, 3072, 32)],
    "llama3": [("gate", 4096, 14336, 16), ("down", 14336, 4096, 32)],
    "smollm2": [("up", 576, 1536, 4), ("down", 1536, 576, 4)],
}
"""By model: a projection's name, input and output channels, and groups of the grouped block."""
STRUCTURES: dict[str, dict[str, Any]] = {
    "grouped_pointwise": {},
    "grouped_pointwise, learned": {"channel_order": "learned"},
    "grouped_pointwise, residual": {"variant": "residual"},
    "low_rank": {},
    "pivoted_low_rank": {},
    "block_shuffle": {},
    "grouped_low_rank": {},
}
"""By label: a structure and its options besides the size."""
ROWS = (1, 8, 32, 128, 512, 4096)
_COPIED = 2**28  # bytes
_SIDE = 2048
_UNCACHED = 2**26  # bytes
_MOST_COPIES = 16
_LEAST_SECONDS = 0.2  # that each candidate is timed for, or three rounds


@dataclass
class Timing:
    """Seconds of one projection under all structures, for one number of rows."""

    shape: str
    rows: int
    dtype: str
    seconds: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the dense weights."""
    floor: dict[str, float] = field(default_factory=dict)

    def share(self, label: str) -> float:
        """Return which share of the ideal speed-up is reached."""
        return self.seconds["dense"] * self.weights[label] / self.seconds[label]


def naive(block: Any, x_NI: Tensor) -> Tensor:
    """Compute a grouped block's formula as it is written: one einsum for each branch."""
    i = block.in_features // block.groups
    first, second = block.weight[:, :i], block.weight[:, i:]
    y = torch.einsum("ngi,gio->ngo", x_NI.unflatten(1, (block.groups, i)), first)
    z = torch.einsum("nig,gio->ngo", x_NI.unflatten(1, (i, block.groups)), second)
    return (y + z).flatten(1)


def medians(runs: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Return the median seconds of each over interleaved rounds, the first round left out."""
    wait: Any = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    taken: list[list[float]] = [[] for _ in runs]
    spent, shuffled = 0.0, random.Random(0)
    while len(taken[0]) < 4 or (spent < _LEAST_SECONDS * len(runs) and len(taken[0]) < 200):
        # Shuffled: what comes after the largest finds the least of its own in the caches.
        for run, seconds in shuffled.sample(list(zip(runs, taken, strict=True)), len(runs)):
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds.append(time.perf_counter() - start)
            spent += seconds[-1]
    return [statistics.median(seconds[1:]) for seconds in taken]


def limits(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Return bytes copied and operations done a second, each measured at a large size."""
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(_SIDE, _SIDE, device=device).to(dtype)
    copy, product = medians([lambda: target.copy_(source), lambda: a @ a], device)
    return 2 * _COPIED / copy, 2 * _SIDE**3 / product


def as_run(
    modules: list[nn.Module], forward: Callable[..., Tensor], x: Tensor, training: bool
) -> Callable[[], object]:
    """Return what is timed: a forward pass of the next copy, in training with the gradients."""
    turn = itertools.cycle(modules)
    if not training:
        return lambda: forward(next(turn), x)
    ones = torch.ones_like(forward(modules[0], x))

    def both() -> object:
        module = next(turn)
        return torch.autograd.grad(forward(module, x), [x, *module.parameters()], ones)

    return both


def candidates(
    shape: tuple[str, int, int, int], structures: tuple[str, ...], **kind: Any
) -> dict[str, Callable[[], nn.Module]]:
    """Return what makes the dense projection, and blocks of a grouped one's size, by label."""
    _, i, o, groups = shape
    makers: dict[str, Callable[[], nn.Module]] = {
        "dense": partial(nn.Linear, i, o, bias=False, **kind)
    }
    for label in structures:
        name = label.partition(",")[0]
        size = {"groups": groups} if name == "grouped_pointwise" else {"keep_ratio": 2 / groups}
        cls: Any = structure_class(name)
        resolved = cls.resolve(i, o, cls.read_options({**size, **STRUCTURES[label]}))
        spec = {"structure": name, "in_features": i, "out_features": o, **vars(resolved)}
        makers[label] = partial(build, spec, **kind)
    return makers


def timed(
    shape: tuple[str, int, int, int],
    rows: int,
    structures: tuple[str, ...],
    options: Any,
    limit: tuple[float, float],
) -> Timing:
    """Time one projection under all structures."""
    name, i, o, _ = shape
    dtype, device = getattr(torch, options["dtype"]), torch.device(options["device"])
    passes = 3 if options["training"] else 1
    x = torch.randn(rows, i, device=device).to(dtype).requires_grad_(options["training"])
    result = Timing(f"{name} {i} x {o}", rows, options["dtype"])
    forward: Callable[..., Tensor] = lambda module, x: module(x)  # noqa: E731  compiled below
    formula: Callable[..., Tensor] = naive
    if options["compiled"]:
        torch.compiler.reset()
        forward, formula = torch.compile(forward), torch.compile(formula)
    runs: dict[str, Callable[[], object]] = {}
    for label, make in candidates(shape, structures, dtype=dtype, device=device).items():
        first = make()
        weights = sum(p.numel() for p in first.parameters())
        bytes_ = weights * x.element_size()
        copies = 1 if options["compiled"] else min(_MOST_COPIES, -(-_UNCACHED // bytes_))
        modules = [first, *(make() for _ in range(copies - 1))]
        runs[label] = as_run(modules, forward, x, options["training"])
        moved = bytes_ + x.element_size() * rows * (i + o)
        result.floor[label] = passes * max(moved / limit[0], 2 * rows * weights / limit[1])
        result.weights[label] = weights / (i * o)
        if label == "grouped_pointwise":
            torch.testing.assert_close(first(x), naive(first, x), rtol=0.05, atol=0.05)
            more = [make() for _ in modules]  # of its own, or it would find them in a cache
            runs["einsum"] = as_run(more, formula, x, options["training"])
            for figures in (result.floor, result.weights):
                figures["einsum"] = figures[label]
    result.seconds = dict(zip(runs, medians(list(runs.values()), device), strict=True))
    return result


def table(timings: list[Timing]) -> str:
    """Return Markdown: of each structure the share of the ideal speed-up, and of the floor."""
    labels = [label for label in timings[0].seconds if label not in ("dense", "einsum")]
    header = ["projection", "rows", "type", "dense, us", *labels]
    if "einsum" in timings[0].seconds:
        header.append("einsum / grouped_pointwise")
    lines = []
    for timing in timings:
        cells = [
            timing.shape,
            f"{timing.rows:,}",
            timing.dtype,
            f"{1e6 * timing.seconds['dense']:,.0f}",
        ]
        for label in labels:
            of_floor = timing.floor[label] / timing.seconds[label]
            cells.append(f"{timing.share(label):.2f} ({of_floor:.2f})")
        if "einsum" in timing.seconds:
            ratio = timing.seconds["einsum"] / timing.seconds["grouped_pointwise"]
            cells.append(f"{ratio:.2f}")
        lines.append(cells)
    return markdown(header, lines)


def plot(timings: list[Timing], file: Path) -> None:
    """Draw the share of the ideal speed-up over the rows, one picture for each projection."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        click.echo("no picture: matplotlib is not installed", err=True)
        return
    kinds = sorted({(timing.shape, timing.dtype) for timing in timings})
    figure = Figure(figsize=(5 * len(kinds), 4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        of_kind = [timing for timing in timings if (timing.shape, timing.dtype) == kind]
        for label in list(of_kind[0].seconds)[1:]:
            shares = [timing.share(label) for timing in of_kind]
            axes.plot([timing.rows for timing in of_kind], shares, marker="o", label=label)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel="rows", title=", ".join(kind), ylim=(0, None))
    figure.axes[0].set_ylabel("share of the ideal speed-up")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(file)


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(SHAPES)), help="Shapes.")
@click.option("--structure", "structures", multiple=True, type=click.Choice(list(STRUCTURES)))
@click.option("--rows", "counts", multiple=True, type=int, help="Rows of the input; repeatable.")
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16"]))
@click.option("--training", is_flag=True, help="With the gradients of input and weights.")
@click.option("--compiled", is_flag=True, help="Under torch.compile.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Keep the seconds.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw them: .svg, .png.")
def main(
    models: Any, structures: Any, counts: Any, threads: int, json_file: Any, **options: Any
) -> None:
    """Print a table; every option that may be repeated stands for all when left out."""
    set_up(threads)
    picture = options.pop("picture")
    torch.set_grad_enabled(options["training"])
    device = torch.device(options["device"])
    limit = limits(getattr(torch, options["dtype"]), device)
    click.echo(f"{machine(options['device'])}, {options['dtype']}")
    click.echo(f"copy {limit[0] / 1e9:.1f} GB/s, product {limit[1] / 1e9:,.0f} GFLOPS")
    timings = []
    for model in models or SHAPES:
        for shape in SHAPES[model]:
            for rows in counts or ROWS:
                timings.append(timed(shape, rows, structures or tuple(STRUCTURES), options, limit))
                click.echo(f"{model} {timings[-1].shape}: {rows} rows", err=True)
    click.echo(table(timings))
    if json_file:
        json_file.write_text(json.dumps([asdict(timing) for timing in timings], indent=1))
    if picture:
        plot(timings, picture)


if __name__ == "__main__":
    main()
