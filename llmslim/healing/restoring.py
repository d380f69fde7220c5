"""Restore what healing changes in a model for a while.

A teacher is moved, converted to float32, frozen and put in evaluation mode; a model in training
gets another attention, gradient checkpointing and no cache. All of that is recorded here, and
restored also after an error or Ctrl-C.
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
    """Put a model in evaluation mode, and restore the mode of each module afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def as_it_was(model: Any, *, weights: bool = False) -> Iterator[None]:
    """Restore a model's training mode, configs, hooks and gradient checkpointing.

    Args:
        model: a model; anything else is ignored.
        weights: also restore types, devices and gradients of parameters and buffers. Values are
            not restored; those that were only converted to float32 are exact.
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
            tensor.grad = None  # its type and device must be the tensor's
            tensor.data = tensor.data.to(device=device, dtype=dtype)
            tensor.requires_grad_(wanted)
            tensor.grad = gradient


def _configs(model: nn.Module) -> Iterator[Any]:
    """Yield all configs of a model and its modules, nested and generation configs included."""
    for module in model.modules():
        found = [getattr(module, "config", None), getattr(module, "generation_config", None)]
        while found:
            config = found.pop()
            if hasattr(config, "__dict__"):
                yield config
                inner = getattr(config, "sub_configs", None) or ()
                found += [getattr(config, name, None) for name in inner]


def to_compute(model: nn.Module, device: torch.device, *, bf16: bool) -> None:
    """Move a model to a device, in a type to compute with, in place.

    Args:
        model: any.
        device: where to.
        bf16: whether the arithmetic is bfloat16. If not, narrower floating types become float32.
    """
    model.to(device)
    for tensor in () if bf16 else (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.element_size() < 4:
            tensor.data = tensor.data.float()
