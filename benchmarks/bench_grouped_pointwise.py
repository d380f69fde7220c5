"""Time a grouped pointwise block next to the naive two einsums and next to the dense projection.

    python benchmarks/bench_grouped_pointwise.py [--repeats 20] [--dtype float32]

Every figure is the fastest of `--repeats` interleaved rounds on this machine; the ratios are
what to compare between machines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import click
import torch
from torch import Tensor, nn

from llmslim import GroupedPointwise

SHAPES = {
    "SmolLM2 up": (576, 1536, 4),
    "SmolLM2 down": (1536, 576, 4),
    "Phi-3 qkv": (3072, 9216, 12),
    "Phi-3 down": (8192, 3072, 32),
}


def naive(block: GroupedPointwise, x: Tensor) -> Tensor:
    """Compute the report's formula as it is written: one einsum for each branch."""
    rows, groups = x.shape[0], block.groups
    i = block.in_features // groups
    first = x.reshape(rows, groups, i)
    second = x.reshape(rows, i, groups).transpose(1, 2)
    y = torch.einsum("ngi,gio->ngo", first, block.weight[:, :i])
    y = y + torch.einsum("ngi,gio->ngo", second, block.weight[:, i:])
    return y.reshape(rows, block.out_features)


def fastest(candidates: list[Callable[[], Tensor]], repeats: int) -> list[float]:
    """Return the least seconds of each candidate over interleaved rounds."""
    best = [float("inf")] * len(candidates)
    for _ in range(repeats + 2):
        for index, run in enumerate(candidates):
            start = time.perf_counter()
            run()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


@click.command()
@click.option("--repeats", default=20, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@torch.no_grad()
def main(repeats: int, dtype: str) -> None:
    """Print a table of microseconds and ratios."""
    kind = getattr(torch, dtype)
    click.echo(f"{torch.__version__}, {torch.get_num_threads()} threads, {dtype}")
    click.echo(f"{'shape':14} {'rows':>5} {'dense':>9} {'einsums':>9} {'block':>9}  einsums/block")
    for name, (in_features, out_features, groups) in SHAPES.items():
        block = GroupedPointwise(in_features, out_features, groups=groups, dtype=kind)
        dense = nn.Linear(in_features, out_features, bias=False, dtype=kind)
        for rows in (1, 64, 1024, 4096):
            x = torch.randn(rows, in_features, dtype=kind)
            torch.testing.assert_close(block(x), naive(block, x), rtol=0.05, atol=0.05)
            runs = [partial(dense, x), partial(naive, block, x), partial(block, x)]
            times = fastest(runs, repeats)
            cells = " ".join(f"{1e6 * seconds:9.0f}" for seconds in times)
            click.echo(f"{name:14} {rows:5} {cells}  {times[1] / times[2]:.2f}")


if __name__ == "__main__":
    main()
