"""One model spread over several processes: PyTorch's fully_shard, through accelerate (FSDP2).

accelerate replaces a model's parameters by pieces, in place and for good. So it is given a copy
that takes over the weights without copying them, and the model, empty meanwhile, gets them back at
the end. Everything else, parameters by their names among it, is as it was for a whole model; only
who reads or writes them must say so here.

Version 1 of FSDP, which packs parameters into flat ones, is refused, and so is DeepSpeed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from llmslim.errors import HealingError
from llmslim.recipe import Heal


def check_sharding(accelerator: Any, spec: Heal) -> None:
    """Refuse ways of spreading a model that healing does not know.

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


def lend(model: Any) -> Any:
    """Return a copy of a model with its weights, which the model itself is then without."""
    taken: dict[int, Any] = {
        id(weight): nn.Parameter(weight.data, requires_grad=weight.requires_grad)
        for weight in model.parameters()
    }
    lent = copy.deepcopy(model, taken)
    for weight in model.parameters():
        weight.data = torch.empty(0, dtype=weight.dtype)
    return lent


@torch.no_grad()
def give_back(lent: Any, model: Any) -> None:
    """Give a model the whole weights of the copy, in main memory; all processes do it together."""
    for name, weight in settled(lent).items():
        model.get_parameter(name).data = whole(weight.detach()).cpu()


def settled(model: Any) -> dict[str, nn.Parameter]:
    """Return parameters by their names, none of them a copy that a forward pass gathered.

    What is written to such a copy would be lost, and some stay after a pass without gradients.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the pieces of all processes, which all ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def overwrite(weight: nn.Parameter, value: Tensor) -> None:
    """Give a parameter new values, in place; of those, each process keeps its piece."""
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        value = distribute_tensor(value.to(mesh.device_type), mesh, weight.placements)
    weight.copy_(value)
