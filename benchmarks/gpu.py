"""Everything that must be seen on a GPU, as one command of about eight minutes.

    python benchmarks/gpu.py --out FOLDER [--text instruct.parquet] [--device cuda]

Step by step, each in a process of its own and with a time limit, what it prints kept in FOLDER:

    correct       forward, input and weight gradient of every structure against float64, next to
                  the error that nn.Linear makes in the same type
    tests         those marked gpu
    decode        1, 8 and 32 rows in bfloat16, eager and compiled: the share of copy bandwidth
    prefill       4,096 rows in bfloat16, eager and compiled: the share of the matrix product rate
    training      4,096 rows with gradients
    table         one row of the report's table at scale `small`: tokens/s of healing (with --text)

A step that fails or takes too long is named at the end, and the exit status is 1; the others run.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import click
import torch
from _common import machine, markdown
from bench_blocks import SHAPES, STRUCTURES, candidates
from torch import Tensor, nn

_ROWS = 64
_BENCHMARKS = Path(__file__).parent


def errors(device: str, dtype: torch.dtype) -> str:
    """Return a Markdown table of relative errors against float64 of the same weights."""
    lines = []
    for shape in (shapes[-1] for shapes in SHAPES.values()):
        makers = candidates(shape, tuple(STRUCTURES), device=device, dtype=dtype)
        for label, make in makers.items():
            module, x = make(), torch.randn(_ROWS, shape[1], device=device).to(dtype)
            found = _results(module, x)
            exact = _results(module.double(), x.double())
            cells = [
                f"{(value.double() - true).norm() / true.norm():.1e}"
                for value, true in zip(found, exact, strict=True)
            ]
            lines.append([f"{shape[1]} x {shape[2]}", label, *cells])
    return markdown(["projection", "structure", "output", "input gradient", "weight"], lines)


def _results(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    torch.manual_seed(0)
    upstream = torch.randn(y.shape, dtype=torch.float64).to(y)
    gradients = torch.autograd.grad(y, [x, *module.parameters()], upstream)
    return [y, gradients[0], torch.cat([gradient.flatten() for gradient in gradients[1:]])]


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for results.")
@click.option("--text", help="Text of instructions, for healing.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--only-errors", is_flag=True, hidden=True, help="The first step, in this process.")
def main(out: Path, text: str | None, device: str, only_errors: bool) -> None:
    """Run the steps.

    Raises:
        ClickException: if one failed.
    """
    if only_errors:
        click.echo(f"{machine(device)}, bfloat16\n{errors(device, torch.bfloat16)}")
        return
    out.mkdir(parents=True, exist_ok=True)
    blocks = ["bench_blocks.py", "--device", device, "--dtype", "bfloat16"]
    decode = [*blocks, *("--rows", "1", "--rows", "8", "--rows", "32")]
    prefill = [*blocks, "--rows", "4096"]
    steps: dict[str, tuple[list[str], int]] = {
        "correct": (["gpu.py", "--only-errors", "--device", device, "--out", str(out)], 60),
        "tests": (["-m", "pytest", "-q", "-m", "gpu", str(_BENCHMARKS.parent / "tests")], 120),
        "decode": ([*decode, "--json", str(out / "decode.json")], 60),
        "decode, compiled": ([*decode, "--compiled"], 90),
        "prefill": ([*prefill, "--json", str(out / "prefill.json")], 60),
        "prefill, compiled": ([*prefill, "--compiled"], 90),
        "training": ([*prefill, "--training", "--json", str(out / "training.json")], 60),
    }
    if text:
        table = ["bench_kphi3_table.py", "--scale", "small", "--text", text, "--seeds", "1"]
        table += ["--rows", "kphi3-3", "--rates", "2e-3", "--tokens", "400000"]
        steps["table"] = ([*table, "--json", str(out / "table.json")], 120)
    failed = []
    for name, (command, limit) in steps.items():
        start = time.perf_counter()
        if command[0] != "-m":
            command = [str(_BENCHMARKS / command[0]), *command[1:]]
        try:
            run = subprocess.run(
                [sys.executable, *command], capture_output=True, text=True, timeout=limit
            )
            ended, printed = run.returncode, run.stdout + run.stderr
        except subprocess.TimeoutExpired as stopped:
            ended, printed = -1, f"stopped after {limit} s\n{stopped.stdout or b''!r}"
        (out / f"{name}.txt").write_text(printed)
        click.echo(f"== {name}: exit status {ended}, {time.perf_counter() - start:.0f} s")
        click.echo(printed)
        if ended:
            failed.append(name)
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
