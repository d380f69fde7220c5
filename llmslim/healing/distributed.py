"""The processes of a healing: one, or those that `accelerate launch` started.

accelerate may shard the model over them with PyTorch's fully_shard (FSDP2), which replaces the
model's parameters by shards, in place and irreversibly. So it gets a copy that takes the weights
over, and the model, empty meanwhile, gets them back at the end. Parameters keep their names; only
code that reads or writes them must use the functions here.

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
    """Return accelerate's state, also of several processes on CPUs."""
    # The recipe's `precision` sets the arithmetic; accelerate's would add to it.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    if _asks_to_shard():
        # Every process reads all weights: the teacher is not sharded, and files are checked fully.
        disable_fsdp_ram_efficient_loading()
    # By default accelerate looks for other processes on CPUs only with `--cpu`.
    return PartialState(cpu=not torch.accelerator.is_available())


def is_sharded(state: PartialState) -> bool:
    """Return whether the model is sharded over the processes, instead of a whole one in each."""
    return _asks_to_shard() and state.distributed_type != DistributedType.NO


def process_notes(state: PartialState) -> list[str]:
    """Return a note for the report if there are several processes."""
    if state.num_processes == 1:
        return []
    how = "which shard the model (FSDP)" if is_sharded(state) else "with a whole model in each"
    return [f"Trained by {state.num_processes} processes, {how}."]


def _asks_to_shard() -> bool:
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def check_sharding(accelerator: Any, spec: Heal) -> None:
    """Refuse ways of sharding a model that healing does not support.

    Raises:
        HealingError: if accelerate is set up for one of them.
    """
    state = accelerator.state
    if getattr(state, "deepspeed_plugin", None) is not None:
        raise HealingError(
            "accelerate: DeepSpeed; healing shards a model with FSDP, version 2. Launch with "
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
            "accelerate: fsdp_activation_checkpointing, which renames parameters. Leave it out, "
            "and set gradient_checkpointing: true in the `heal` section, which has the same effect."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise HealingError(
            "accelerate: fsdp_offload_params; healing keeps the shards on the devices. Leave it "
            "out, and use more processes or gradient_checkpointing: true in the `heal` section."
        )
    if spec.train == "lora":
        raise HealingError(
            "heal.train: lora, with a model that is sharded over processes (FSDP); allowed are "
            "`all` and `blocks`. Use one of them, or a whole model in each process (`--multi_gpu`)."
        )


def shard_copy(model: Any) -> Any:
    """Return a copy of a model that takes over its weights, which leaves the model empty."""
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
    """Put the full weights of a sharded copy into the model, in main memory.

    All processes must call it together.
    """
    for name, weight in named_full_parameters(copied).items():
        model.get_parameter(name).data = full_tensor(weight.detach()).cpu()


def named_full_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return parameters by name, never the copies that a forward pass gathered.

    Such copies may stay after a pass without gradients, and what is written to them is lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor with the shards of all processes, which must call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def overwrite(weight: nn.Parameter, value: Tensor) -> None:
    """Give a parameter new values, in place; each process keeps its shard of them."""
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        value = distribute_tensor(value.to(mesh.device_type), mesh, weight.placements)
    weight.copy_(value)
