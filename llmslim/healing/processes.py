"""The processes of a healing: one, or those that `accelerate launch` started."""

from __future__ import annotations

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Return accelerate's state; processes on CPUs alone find each other too."""
    # Left to itself, accelerate looks for other processes on a CPU only under `--cpu`.
    return PartialState(cpu=not torch.accelerator.is_available())
