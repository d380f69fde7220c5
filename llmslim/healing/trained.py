"""What is trained: which parameters, in which group, and LoRA on what stayed dense.

- `blocks`: what surgery changed, blocks and narrowed MLPs, and nothing else.
- `all`: every parameter.
- `lora`: what surgery changed in full, and LoRA matrices beside every dense map inside the decoder
  layers that it left. They are multiplied out at the end: a healed model has no LoRA in it.

Parameters are float32 while they are trained, whatever the checkpoint stores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmslim.errors import HealingError
from llmslim.healing.sharding import settled
from llmslim.modeling.modeling_llmslim import set_module
from llmslim.modeling.structured import StructuredLinear
from llmslim.recipe import Heal
from llmslim.surgery.sites import find_layers, find_sites

ALPHA_PER_RANK = 2
"""Scale of LoRA matrices."""


@dataclass
class Trained:
    """A model that was made ready for training, and how to undo that."""

    model: Any
    changed: frozenset[str]
    """Names of parameters that belong to what surgery changed."""
    dtypes: dict[str, torch.dtype]
    """Types that parameters had, by name."""
    gradients: dict[str, bool]
    """Whether parameters wanted gradients before, by name."""
    lora: tuple[str, ...] = field(default=())
    """Names of dense maps with LoRA beside them."""

    def names(self) -> list[str]:
        """Return the names of the parameters that are trained."""
        return [n for n, p in self.model.named_parameters() if p.requires_grad]

    def count(self) -> int:
        """Return how many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @torch.no_grad()
    def round_to_stored(self) -> bool:
        """Round parameters to the types they are stored in, still as float32, in place.

        Returns:
            Whether that changed anything that could be measured.
        """
        narrow = {n: p for n, p in settled(self.model).items() if p.requires_grad}
        narrow = {n: p for n, p in narrow.items() if self.dtypes.get(n, p.dtype) != p.dtype}
        for name, parameter in narrow.items():
            parameter.copy_(parameter.to(self.dtypes[name]))
        return bool(narrow)

    def release(self) -> None:
        """Undo what training did to the model besides training it, in place."""
        keep_activations(self.model, keep=True)
        self.model.to("cpu").eval()
        self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Multiply LoRA out and give every parameter the type it had, in place."""
        for name in self.lora:
            layer = self.model.get_submodule(name)
            layer.merge()
            set_module(self.model, name, layer.get_base_layer())
        if self.lora:
            del self.model.peft_config
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(self.dtypes[name])
            parameter.requires_grad_(self.gradients[name])


def keep_activations(model: Any, *, keep: bool) -> None:
    """Switch gradient checkpointing off or on, in place."""
    # transformers 5.22 renamed what does that.
    old, new = "gradient_checkpointing", "activation_checkpointing"
    name = new if hasattr(model, f"{new}_enable") else old
    if keep:
        if getattr(model, f"is_{name}", False):
            getattr(model, f"{name}_disable")()
    else:
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})


def changed_modules(model: nn.Module, narrowed: Iterable[str] = ()) -> list[str]:
    """Return the names of the modules that surgery changed.

    Args:
        model: slim, or plain with narrowed MLPs.
        narrowed: names of dense maps that are known to have other sizes than in the source model;
            a model does not show that itself.
    """
    sites = (getattr(model.config, "llmslim", None) or {}).get("sites", {})
    known = {*sites, *narrowed}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, StructuredLinear) or name in known
    ]


def make_trainable(model: Any, spec: Heal, narrowed: Iterable[str] = ()) -> Trained:
    """Choose what is trained and widen the parameters to float32, in place.

    Args:
        model: a causal language model.
        spec: `train`, `lora_rank` and `seed`.
        narrowed: as for `changed_modules`.

    Raises:
        HealingError: if there is nothing to train.
    """
    modules = changed_modules(model, narrowed)
    if spec.train == "blocks" and not modules:
        raise HealingError(
            "heal.train: blocks, but this model has none: no structured blocks and no narrowed "
            "MLPs; allowed are `all` and `lora`. Train `all`, or slim the model first."
        )
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(spec.train == "all")
    lora: tuple[str, ...] = ()
    if spec.train == "lora":
        lora = _dense_maps(model, modules)
        if not lora and not modules:
            raise HealingError("heal.train: lora, but the model has no dense maps. Train `all`.")
        _add_lora(model, lora, spec)
    changed = frozenset(
        f"{name}.{inner}" for name in modules for inner, _ in _own_parameters(model, name)
    )
    for name, parameter in model.named_parameters():
        if name in changed:
            parameter.requires_grad_(requires_grad=True)
    return Trained(model, changed, dtypes, gradients, lora)


def _own_parameters(model: nn.Module, name: str) -> list[tuple[str, nn.Parameter]]:
    return list(model.get_submodule(name).named_parameters())


def _dense_maps(model: Any, changed: list[str]) -> tuple[str, ...]:
    """Return the dense maps inside the decoder layers that surgery left as they were."""
    stack = find_layers(model).path
    inside = tuple(f"{name}." for name in changed)
    return tuple(
        name
        for name in find_sites(model)
        if name.startswith(f"{stack}.") and name not in changed and not name.startswith(inside)
    )


def _add_lora(model: Any, names: tuple[str, ...], spec: Heal) -> None:
    """Put LoRA matrices beside dense maps, in place; they compute nothing yet."""
    if not names:
        return
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=spec.lora_rank,
        lora_alpha=ALPHA_PER_RANK * spec.lora_rank,
        # A pattern, since a plain list matches names by their ends.
        target_modules="|".join(map(re.escape, names)),
        fan_in_fan_out=type(model.get_submodule(names[0])).__name__ == "Conv1D",
    )
    torch.manual_seed(spec.seed)  # one of the two matrices is random
    inject_adapter_in_model(config, model)
