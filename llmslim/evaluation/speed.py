"""How fast models generate, through transformers' `generate` as users call it.

Models take turns, round by round, so that what slows the machine for a while slows all of them;
a figure is the median over the rounds. A first round warms up and is not counted.

Shapes: B rows of L tokens.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from llmslim.data import longest_input
from llmslim.errors import DataError
from llmslim.evaluation.opening import folder_of, library_versions, opened
from llmslim.options import BenchOptions
from llmslim.progress import quietly
from llmslim.report.read import read_report
from llmslim.report.speeds import Benchmark, Speed, keep_benchmark
from llmslim.storage import REPORT

_GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
_PEAK = "the weights, and the most that was allocated beside them"
_HELD = "the weights and the cache of keys and values, without what is computed in between"


class _Clock(StoppingCriteria):
    """Notes the time after each token, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG002  (its signature)
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def benchmark_model(model: PreTrainedModel | str | Path, options: BenchOptions) -> Benchmark:
    """Measure a model; arguments and result as of `llmslim.bench`.

    Raises:
        DataError: if a number is wrong, or longer than what a model can read.
    """
    batches = _checked(options)
    progress = options.progress or quietly
    progress(0, 0, "reading the model")
    ours, name, _ = opened(model, options)
    models, against = {name: ours}, ""
    if options.against is not None:
        theirs, against, _ = opened(options.against, options)
        against = against if against != name else f"{against} (dense)"
        models[against] = theirs
    for one in models.values():
        _check_length(one, options.prompt + options.new_tokens)
    with ExitStack() as stack:
        for one in models.values():
            stack.callback(one.train, one.training)
            one.eval()
        found, notes = _in_turn(models, batches, options)
    device = ours.device
    result = Benchmark(
        name,
        _device_name(device),
        str(ours.dtype).removeprefix("torch."),
        options.prompt,
        options.new_tokens,
        options.rounds,
        _PEAK if device.type == "cuda" else _HELD,
        tuple(found[name]),
        against,
        tuple(found.get(against, ())),
        _ideal(model) if against else None,
        notes,
        library_versions(),
    )
    folder = folder_of(model) if options.store else None
    if folder is not None:
        keep_benchmark(folder, result)
    return result


def _checked(options: BenchOptions) -> tuple[int, ...]:
    """Return the sizes of batches, once all numbers are checked.

    Raises:
        DataError: if one is too small.
    """
    given = options.batch
    batches = (given,) if isinstance(given, int) else tuple(dict.fromkeys(given))
    least = {"prompt": (options.prompt, 1), "rounds": (options.rounds, 1)}
    # The first new token belongs to the reading; writing begins with the second.
    least |= {"new_tokens": (options.new_tokens, 2), "batch": (min(batches, default=0), 1)}
    for key, (value, at_least) in least.items():
        if value < at_least:
            raise DataError(f"{key}: {value}; at least {at_least} is needed.")
    return batches


def _check_length(model: Any, length: int) -> None:
    most = longest_input(model)
    if most is not None and length > most:
        raise DataError(
            f"prompt and new_tokens: {length} tokens; {type(model).__name__} reads {most}. "
            "Give smaller numbers."
        )


def _in_turn(
    models: Mapping[str, Any], batches: Sequence[int], options: BenchOptions
) -> tuple[dict[str, list[Speed]], tuple[str, ...]]:
    """Return the speeds of each model, and a sentence for each batch that did not fit."""
    progress = options.progress or quietly
    found: dict[str, list[Speed]] = {name: [] for name in models}
    notes: list[str] = []
    turns = len(batches) * (options.rounds + 1)
    for place, batch in enumerate(batches):
        seen: dict[str, list[Speed]] = {name: [] for name in models}
        try:
            for number in range(options.rounds + 1):
                progress(place * (options.rounds + 1) + number, turns, f"batch {batch}")
                for name, model in models.items():
                    seen[name].append(_measure(model, batch, options))
        except torch.OutOfMemoryError:
            notes.append(f"Batch {batch} does not fit into the memory of the device.")
            continue
        for name, rounds in seen.items():
            found[name].append(_median(rounds[1:]))
    progress(turns, turns, "done")
    return found, tuple(notes)


def _median(rounds: Sequence[Speed]) -> Speed:
    middle = {
        key: median(getattr(one, key) for one in rounds)
        for key in ("first_token_seconds", "prefill", "decode")
    }
    return Speed(rounds[0].batch, **middle, memory=max(one.memory for one in rounds))


@torch.inference_mode()
def _measure(model: Any, batch: int, options: BenchOptions) -> Speed:
    """Generate once."""
    device, size = model.device, (batch, options.prompt)
    draw = torch.Generator().manual_seed(batch)
    words = model.config.get_text_config().vocab_size
    ids_BL = torch.randint(words, size, generator=draw).to(device)
    weights = sum(one.untyped_storage().nbytes() for one in _distinct(model.parameters()))
    on_gpu, clock = device.type == "cuda", _Clock()
    before = 0
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    made = model.generate(
        input_ids=ids_BL,
        attention_mask=torch.ones_like(ids_BL),
        min_new_tokens=options.new_tokens,
        max_new_tokens=options.new_tokens,
        pad_token_id=0,
        use_cache=True,
        stopping_criteria=StoppingCriteriaList([clock]),
        return_dict_in_generate=True,
        **_GREEDY,
    )
    beside = (
        torch.cuda.max_memory_allocated(device) - before
        if on_gpu
        else sum(one.nbytes for one in _tensors(made.past_key_values))
    )
    first, last = clock.times[0], clock.times[-1]
    return Speed(
        batch,
        first - start,
        ids_BL.numel() / (first - start),
        batch * (len(clock.times) - 1) / (last - first),
        weights + beside,
    )


def _distinct(weights: Iterator[Tensor]) -> list[Tensor]:
    """Return one tensor of each piece of memory."""
    return list({one.untyped_storage().data_ptr(): one for one in weights}.values())


def _tensors(thing: Any) -> Iterator[Tensor]:
    """Yield the tensors inside a cache, whatever it is made of."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        yield from (inner for value in thing.values() for inner in _tensors(value))
    elif isinstance(thing, list | tuple):
        yield from (inner for value in thing for inner in _tensors(value))
    elif hasattr(thing, "__dict__") and not isinstance(thing, type):
        yield from _tensors(vars(thing))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} {'thread' if threads == 1 else 'threads'}"


def _ideal(model: PreTrainedModel | str | Path) -> float | None:
    """Return how many times fewer weights a token is multiplied with, from the model's report."""
    if isinstance(model, PreTrainedModel) or not (Path(model) / REPORT).is_file():
        return None
    totals = read_report(model).report.totals
    after = totals.flops_per_token_after
    return totals.flops_per_token_before / after if after else None
