"""Where blocks are fitted to text: the processor, or a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmslim.errors import SlimError, UnfinishedError

from .conversion_dir import ConversionDir


def device_named(name: str | None) -> torch.device:
    """Return a device that is there.

    Args:
        name: such as `cpu`, `cuda` or `cuda:1`; an NVIDIA or AMD GPU where there is one by
            default, else the processor.

    Raises:
        SlimError: if there is none of that name.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        # Sums are kept in float64, which not every device has.
        torch.zeros(1, dtype=torch.float64, device=device).item()
    except Exception as error:  # each kind of device has its own
        count = torch.cuda.device_count()
        gpus = [f"cuda:{index}" for index in range(count)]
        raise SlimError(
            f"device: {name!r}; blocks can be fitted here on {', '.join(['cpu', *gpus])}. Choose "
            "one of these."
        ) from error
    return device


@contextmanager
def memory_of(device: torch.device, work: ConversionDir) -> Iterator[None]:
    """Turn out-of-memory into an error with a remedy.

    Args:
        device: that blocks are fitted on.
        work: where what is done by then is kept, if anything is.

    Raises:
        UnfinishedError: in place of torch's own error, where something is kept.
        SlimError: in place of it, where nothing is.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        problem = (
            f"device: {device}; its free memory is too little for this fit. Take fewer tokens "
            "(--calibration-tokens), or fit on the processor (--device cpu)"
        )
        if not work.exists:
            raise SlimError(f"{problem}.") from error
        raise UnfinishedError(
            f"{problem}; for either, start over (--overwrite). What is done is kept in "
            f"{work.path}: with more memory free, continue it with --resume."
        ) from error
