"""What proving by computing costs a conversion: CPU time with and without the proof, side by side.

    python benchmarks/bench_proof.py MODEL [--recipe mlp-half] [--init project] [--repeat 5]
        [--threads N]

Each run is a conversion in a fresh process; with and without take turns, so that other work on the
machine meets both. Without, pieces are neither run when they are made nor when they are loaded
back; headers and bytes are compared in both. CPU seconds are of the conversion alone, user and
system, all threads; imports are not counted.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

_RUN = """
import sys, time
import llmslim.api
from llmslim.conversion import streamed
model, out, recipe, init, proof = sys.argv[1:]
if proof == "without":
    class NoRunner:
        def __init__(self, pieces): pass
        def fingerprint(self, piece): return []
    streamed.PieceRunner = NoRunner
    streamed.check_computes = lambda *args: None
start = time.process_time()
llmslim.api.convert(model, recipe, out, init=init or None)
print(time.process_time() - start)
"""


@click.command()
@click.argument("model")
@click.option("--recipe", default="mlp-half", show_default=True)
@click.option("--init", default="project", show_default=True)
@click.option("--threads", type=int, help="Of torch; as many as there are cores by default.")
@click.option("--repeat", default=5, show_default=True, help="Conversions of each kind.")
def main(model: str, recipe: str, init: str, threads: int | None, repeat: int) -> None:
    """Convert MODEL, with the proof and without."""
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(repeat):
        for kind, found in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                out = str(Path(folder) / "out")
                command = [sys.executable, "-c", _RUN, model, out, recipe, init, kind]
                ran = subprocess.run(
                    command, check=True, capture_output=True, text=True, env=environment
                )
            found.append(float(ran.stdout))
    for kind, found in seconds.items():
        each = " ".join(f"{one:.2f}" for one in found)
        click.echo(f"{kind:8} median {statistics.median(found):6.2f} CPU s   ({each})")
    more = statistics.median(
        (one - other) / one for one, other in zip(*seconds.values(), strict=True)
    )
    click.echo(f"the proof takes {more:.1%} of a conversion (median of pairs)")


if __name__ == "__main__":
    main()
