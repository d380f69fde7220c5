"""The processes of a healing: one, or those that `accelerate launch` started."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import (
    DistributedType,
    disable_fsdp_ram_efficient_loading,
    parse_flag_from_env,
)


def processes() -> PartialState:
    """Return accelerate's state; processes on CPUs alone find each other too."""
    # The arithmetic is the recipe's `precision`; accelerate's own would come on top of it.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    if _asks_to_shard():
        # Every process reads whole weights: a teacher stays whole, and files are checked in full.
        disable_fsdp_ram_efficient_loading()
    # Left to itself, accelerate looks for other processes on a CPU only under `--cpu`.
    return PartialState(cpu=not torch.accelerator.is_available())


def is_sharded(state: PartialState) -> bool:
    """Return whether the model is to be spread over the processes, in place of a whole in each."""
    return _asks_to_shard() and state.distributed_type != DistributedType.NO


def process_notes(state: PartialState) -> list[str]:
    """Return what is to be said of how many processes trained, and how."""
    if state.num_processes == 1:
        return []
    how = "the model spread over them (FSDP)" if is_sharded(state) else "a whole model in each"
    return [f"Trained by {state.num_processes} processes, {how}."]


def _asks_to_shard() -> bool:
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))
