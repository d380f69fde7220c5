"""Where a model is run: the processor, or a GPU."""

from __future__ import annotations

import torch

from llmslim.errors import SlimError


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
            f"device: {name!r}; the devices here are {', '.join(['cpu', *gpus])}. Choose "
            "one of these."
        ) from error
    return device
