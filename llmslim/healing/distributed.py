"""The processes of a healing: one, or those that `accelerate launch` started.

One model may be spread over them by PyTorch's fully_shard, through accelerate (FSDP2), which
replaces a model's parameters by pieces, in place and for good. So it is given a copy that takes
over the weights without copying them, and the model, empty meanwhile, gets them back at the end.
Everything else, parameters by their names among it, is as for a whole model; only code that reads
or writes parameters must use the functions here.

Version 1 of FSDP, which packs parameters into flat ones, is refused, and so is DeepSpeed.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import (
    DistributedType,
    disable_fsdp_ram_efficient_loading,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from llmslim.errors import HealingError
from llmslim.recipe import Heal


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
    """Return a sentence for the report on several processes."""
    if state.num_processes == 1:
        return []
    how = "the model spread over them (FSDP)" if is_sharded(state) else "a whole model in each"
    return [f"Trained by {state.num_processes} processes, {how}."]


def _asks_to_shard() -> bool:
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def check_sharding(accelerator: Any, spec: Heal) -> None:
    """Refuse ways of spreading a model that healing does not support.

    Args:
        accelerator: accelerate's.
        spec: the options.

    Raises:
        HealingError: if it is one of them.
    """
    state = accelerator.state
    if getattr(state, "deepspeed_plugin", None) is not None:
        raise HealingError(
            "accelerate: DeepSpeed; healing spreads a model by FSDP, version 2. Launch with "
            "`--use_fsdp --fsdp_version 2`, or with `--multi_gpu`: a whole model in each process."
        )
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise HealingError(
            f"accelerate: FSDP, version {plugin.fsdp_version}; version 2 is needed. Launch with "
            "`--fsdp_version 2`."
        )
    if plugin.activation_checkpointing:
        raise HealingError(
            "accelerate: fsdp_activation_checkpointing, which gives parameters other names. Leave "
            "it out, and set gradient_checkpointing: true in the `heal` section, which does the "
            "same."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise HealingError(
            "accelerate: fsdp_offload_params; healing keeps the pieces on the devices. Leave it "
            "out, and take more processes or gradient_checkpointing: true in the `heal` section."
        )
    if spec.train == "lora":
        raise HealingError(
            "heal.train: lora, with a model that is spread over processes (FSDP); allowed are "
            "`all` and `blocks`. Take one of them, or a whole model in each process "
            "(`--multi_gpu`)."
        )


def shard_copy(model: Any) -> Any:
    """Return a copy of a model that takes over its weights; the model's own are then empty."""
    taken: dict[int, Any] = {
        id(weight): nn.Parameter(weight.data, requires_grad=weight.requires_grad)
        for weight in model.parameters()
    }
    copied = copy.deepcopy(model, taken)
    for weight in model.parameters():
        weight.data = torch.empty(0, dtype=weight.dtype)
    return copied


@torch.no_grad()
def gather_into(model: Any, copied: Any) -> None:
    """Give a model the full weights of its copy, in main memory; all processes call it together."""
    for name, weight in named_full_parameters(copied).items():
        model.get_parameter(name).data = full_tensor(weight.detach()).cpu()


def named_full_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return parameters by their names, none of them a copy that a forward pass gathered.

    What is written to such a copy would be lost, and some stay after a pass without gradients.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor with the pieces of all processes, which all call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def overwrite(weight: nn.Parameter, value: Tensor) -> None:
    """Give a parameter new values, in place; of those, each process keeps its piece."""
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        value = distribute_tensor(value.to(mesh.device_type), mesh, weight.placements)
    weight.copy_(value)
