"""Leave models as they were: what healing changes in one for a while, it puts back.

A teacher is moved, widened, frozen and put in evaluation mode; a model in training gets another
attention, other ways with activations and no cache. All of that is noted here before, and put back
whatever happens: an error and Ctrl-C included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmslim.compat import CHECKPOINTING, HOOKS


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and each of its modules back in its own afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def as_it_was(model: Any, *, weights: bool = False) -> Iterator[None]:
    """Put back how a model trains, what its configs say and how it keeps activations.

    Args:
        model: a model; anything else is passed over.
        weights: put back types, devices and gradients of parameters and buffers too. Those that
            became wider are exactly what they were; values are not kept.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modules = {
        module: (
            module.training,
            {key: vars(module)[key] for key in CHECKPOINTING if key in vars(module)},
            {key: dict(vars(module)[key]) for key in HOOKS},
        )
        for module in model.modules()
    }
    own = set(vars(model))
    configs = {id(config): (config, dict(vars(config))) for config in _configs(model)}
    tensors = [*model.parameters(), *model.buffers()] if weights else []
    about = [(one, one.dtype, one.device, one.requires_grad, one.grad) for one in tensors]
    try:
        yield
    finally:
        for module, (mode, checkpointing, hooks) in modules.items():
            module.training = mode
            for key, known in hooks.items():
                vars(module)[key].clear()
                vars(module)[key].update(known)
            for key in CHECKPOINTING:
                vars(module).pop(key, None)
            vars(module).update(checkpointing)
        for key in vars(model).keys() - own:  # accelerate's marks
            del vars(model)[key]
        for config, fields in configs.values():
            vars(config).clear()
            vars(config).update(fields)
        for tensor, dtype, device, wanted, gradient in about:
            tensor.grad = None  # which has the type and place that the tensor has just now
            tensor.data = tensor.data.to(device=device, dtype=dtype)
            tensor.requires_grad_(wanted)
            tensor.grad = gradient


def _configs(model: nn.Module) -> Iterator[Any]:
    """Yield a model's configs: its own, those inside it, those of its parts, of its generation."""
    for module in model.modules():
        found = [getattr(module, "config", None), getattr(module, "generation_config", None)]
        while found:
            config = found.pop()
            if hasattr(config, "__dict__"):
                yield config
                inner = getattr(config, "sub_configs", None) or ()
                found += [getattr(config, name, None) for name in inner]


def to_compute(model: nn.Module, device: torch.device, *, bf16: bool) -> None:
    """Bring a model to a device, in a type to compute with, in place.

    Args:
        model: any; its type is kept where the arithmetic is bfloat16.
        device: where to.
        bf16: whether it is. Else what is narrower than float32 becomes that.
    """
    model.to(device)
    if not bf16:
        widen(model)


def widen(model: nn.Module) -> None:
    """Give parameters and buffers of narrower floating types float32, in place."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.element_size() < 4:
            tensor.data = tensor.data.float()
