"""What converting a large folder costs: time and peak memory, next to copying and reading it.

    python benchmarks/bench_streaming.py FOLDER [--layers 1 --layers 8 --layers 16 --layers 32]
        [--init random --init project] [--shard-size 2GB] [--repeat 1] [--no-whole]
        [--sizes 3072 8192] [--calibration TEXT --tokenizer FOLDER --tokens 2048]

For each number of layers a checkpoint of random weights in the exact shapes of Phi-3-mini-4k (3.8
billion parameters at 32 layers, bfloat16, several shards), or with other hidden and intermediate
sizes, is made in FOLDER, and removed at the end. Then, each in a fresh process:

    cp           `cp -r` of the folder; what it writes may still be in the page cache
    read         `cat` of its weights
    convert      `llmslim convert --recipe kphi3 --init INIT`, piece by piece, read back and flushed
    whole        from_pretrained, llmslim.slim, save_pretrained: nothing flushed, nothing compared

With --calibration, both also fit by least squares to so many tokens of the text.

Seconds are the best of the repeats, from start to end of the process, imports included. Peak memory
is the process's highest resident size, in GiB; pages of mapped files count.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click

_WHOLE = """
import sys, torch, llmslim
from transformers import AutoModelForCausalLM
from transformers import AutoTokenizer
from llmslim.data import calibration_windows
from llmslim.recipe import Calibration
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
windows = None
if len(sys.argv) > 4:
    spec = Calibration(data=sys.argv[4], tokens=int(sys.argv[5]))
    windows = calibration_windows(spec, AutoTokenizer.from_pretrained(sys.argv[1]), model)
llmslim.slim(model, "kphi3", init=sys.argv[3], calibration=windows)
model.save_pretrained(sys.argv[2])
"""
_MAKE = """
import json, sys, torch
from pathlib import Path
from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM
from huggingface_hub import split_torch_state_dict_into_shards
from llmslim.storage import write_tensors
folder, layers, size = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
hidden, intermediate = map(int, sys.argv[4:6])
config = Phi3Config(
    hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
    num_attention_heads=32,
    num_key_value_heads=32, vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5,
    sliding_window=2047, tie_word_embeddings=False, dtype="bfloat16",
    architectures=["Phi3ForCausalLM"],
)
with torch.device("meta"):
    model = Phi3ForCausalLM(config).bfloat16()
config.save_pretrained(folder)
for tokenizer in sys.argv[6:]:
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
state = model.state_dict()
split = split_torch_state_dict_into_shards(
    state, filename_pattern="model{suffix}.safetensors", max_shard_size=size
)
torch.manual_seed(0)
for file, names in split.filename_to_tensors.items():
    empty = {name: torch.empty(state[name].shape, dtype=state[name].dtype) for name in names}
    write_tensors(folder / file, {name: t.normal_(std=0.02) for name, t in empty.items()})
if split.is_sharded:
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
"""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", "counts", multiple=True, type=int, default=[1, 8, 16, 32])
@click.option("--init", "inits", multiple=True, default=["random", "project"])
@click.option("--shard-size", default="2GB", show_default=True)
@click.option("--repeat", default=1, show_default=True)
@click.option("--whole/--no-whole", default=True, help="Also what holds the whole model.")
@click.option("--sizes", nargs=2, default=(3072, 8192), show_default=True)
@click.option("--calibration", type=click.Path(path_type=Path), help="Text to fit to.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="To read it with.")
@click.option("--tokens", default=2048, show_default=True)
def main(
    folder: Path,
    counts: tuple[int, ...],
    inits: tuple[str, ...],
    shard_size: str,
    repeat: int,
    whole: bool,
    sizes: tuple[int, int],
    calibration: Path | None,
    tokenizer: Path | None,
    tokens: int,
) -> None:
    """Print a table, a row per number of layers and step."""
    click.echo("| layers | step | s | of cp + read | peak GiB |\n|---|---|---|---|---|")
    for layers in counts:
        source, out = folder / f"phi3-{layers}", folder / "out"
        source.mkdir(parents=True)
        make = [sys.executable, "-c", _MAKE, str(source), str(layers), shard_size]
        make += map(str, sizes if tokenizer is None else (*sizes, tokenizer))
        _timed(make)
        weights = sorted(map(str, source.glob("*.safetensors")))
        steps = {"cp": ["cp", "-r", str(source), str(out)], "read": ["cat", *weights]}
        for init in inits:
            command = ["convert", str(source), "--recipe", "kphi3", "--init", init, "-o", str(out)]
            steps[f"convert, {init}"] = [sys.executable, "-m", "llmslim", *command]
        for init in inits if whole else ():
            steps[f"whole, {init}"] = [sys.executable, "-c", _WHOLE, str(source), str(out), init]
        if calibration is not None:
            text, asked = str(calibration.absolute()), str(tokens)
            steps["convert, least_squares"] = [
                *(sys.executable, "-m", "llmslim", "convert", str(source), "--recipe", "kphi3"),
                *("--calibration", text, "--calibration-tokens", asked, "-o", str(out)),
            ]
            fit = [sys.executable, "-c", _WHOLE, str(source), str(out), "least_squares"]
            if whole:
                steps["whole, least_squares"] = [*fit, text, asked]
        base = 0.0
        for name, command in steps.items():
            best, peak = float("inf"), 0.0
            for _ in range(repeat):
                seconds, memory = _timed(command)
                best, peak = min(best, seconds), max(peak, memory)
                shutil.rmtree(out, ignore_errors=True)
            base += best if name in ("cp", "read") else 0
            ratio = "" if name in ("cp", "read") else f"{best / base:.2f}"
            click.echo(f"| {layers} | {name} | {best:.1f} | {ratio} | {peak:.2f} |")
        shutil.rmtree(source)


def _timed(command: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds and its peak memory in GiB.

    Raises:
        ClickException: if it fails.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{command[:4]}: exit status {process.returncode}")
    return seconds, usage.ru_maxrss / 2**20


if __name__ == "__main__":
    main()
