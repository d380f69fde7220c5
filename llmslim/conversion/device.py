"""What to do where a device has too little memory for a fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmslim.errors import SlimError, UnfinishedError

from .conversion_dir import ConversionDir


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
