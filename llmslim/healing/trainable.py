"""Choose the parameters to train, and add LoRA to what stayed dense.

- `blocks`: only what the recipe changed, blocks and narrowed MLPs.
- `all`: every parameter.
- `lora`: what the recipe changed, and LoRA matrices beside every other dense map of the decoder
  layers. At the end they are merged: a healed model has no LoRA in it.

Parameters are float32 during training, whatever the checkpoint's type; `rounding.py` converts them
back. Every measurement is of the model as it would be stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmslim.anatomy.sites import find_layers, find_sites
from llmslim.errors import HealingError, TargetError
from llmslim.healing.distributed import full_tensor, named_full_parameters, overwrite
from llmslim.healing.rounding import rounded
from llmslim.modeling.modeling_llmslim import set_module
from llmslim.modeling.structured import StructuredLinear
from llmslim.recipe import Heal

ALPHA_PER_RANK = 2
"""Scale of LoRA matrices."""


@dataclass
class Trainable:
    """A model prepared for training, and how to undo that."""

    model: Any
    changed: frozenset[str]
    """Names of parameters of what the recipe changed."""
    given: dict[str, torch.dtype]
    """Original types of the parameters, by original name."""
    stored: dict[str, torch.dtype]
    """Types to store the parameters in, by original name."""
    gradients: dict[str, bool]
    """Whether the parameters required gradients before, by original name."""
    device: torch.device
    """Original device."""
    seed: int
    """Of the random numbers in rounding."""
    lora: tuple[str, ...] = field(default=())
    """Names of dense maps with LoRA beside them."""
    _final: bool = field(default=False)

    def count(self) -> int:
        """Return the number of parameters that are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def rounds_to(self) -> tuple[str, ...]:
        """Sorted names of the types that weights are rounded to."""
        types = {self.stored[name] for name, _ in self._rounding()}
        return tuple(sorted(str(one).removeprefix("torch.") for one in types))

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Give the model, in place, the weights that would be stored now, for a while.

        Meanwhile main memory, which is the largest, keeps the weights in training.

        Raises:
            HealingError: if a weight is too large for its type.
        """
        if self._final or not (self.lora or self._rounding()):
            yield
            return
        before = self._store()
        try:
            yield
        finally:
            self._take_back(before)

    def finalise(self) -> None:
        """Give the model the weights to store, in place: LoRA merged, all rounded.

        Types stay those of the training.

        Raises:
            HealingError: if a weight is too large for its type.
        """
        if not self._final:
            self._store(keep=False)
            self._final = True

    @torch.no_grad()
    def release(self) -> None:
        """Finalise the model and undo the preparation, in place.

        Every parameter gets the type to store it in.
        """
        keep_activations(self.model, keep=True)
        self.model.zero_grad()
        self.model.to(self.device).eval()
        if not self._final:
            self._store(keep=False, check=False)
            self._final = True
        for name in self.lora:
            set_module(self.model, name, self.model.get_submodule(name).get_base_layer())
        if self.lora:
            del self.model.get_submodule(find_layers(self.model).path).peft_config
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(self.stored[name])
            parameter.requires_grad_(self.gradients[name])

    def _rounding(self) -> dict[tuple[str, str], bool]:
        """Return the parameters that storing rounds, and whether training changed them.

        Keys are the original name and the current one, which differ beside LoRA.
        """
        found, lora = {}, set(self.lora)
        for name, parameter in self.model.named_parameters():
            first, beside, last = name.partition(".base_layer.")
            with_lora = bool(beside) and first in lora
            before = f"{first}.{last}" if with_lora else name
            if before not in self.stored:  # a LoRA matrix
                continue
            moved = parameter.requires_grad or (with_lora and last == "weight")
            if self.stored[before] != parameter.dtype and (
                moved or self.stored[before] != self.given[before]
            ):
                found[before, name] = moved
        return found

    @torch.no_grad()
    def _store(self, *, keep: bool = True, check: bool = True) -> dict[str, Tensor]:
        """Merge LoRA and round; return the former weights with `keep`."""
        before = {}
        weights = named_full_parameters(self.model)
        rounds = self._rounding()
        if keep:
            # What LoRA is merged into was not trained: its original type is exact.
            merged = {f"{name}.base_layer.weight": f"{name}.weight" for name in self.lora}
            before = {now: _copy(weights[now], self.given[name]) for now, name in merged.items()}
            for _, now in rounds:
                if now not in merged:
                    before[now] = _copy(weights[now], weights[now].dtype)
        for name in self.lora:
            self.model.get_submodule(name).merge()
        try:
            for (name, now), moved in rounds.items():
                value, dtype = full_tensor(weights[now].detach()), self.stored[name]
                if moved:
                    stored = rounded(value, dtype, seed=self.seed, name=name)
                else:
                    stored = value.to(dtype)
                if check:
                    _check_held(name, value, stored)
                overwrite(weights[now], stored.to(value.dtype))
        except BaseException:
            self._take_back(before)
            raise
        return before

    @torch.no_grad()
    def _take_back(self, before: dict[str, Tensor]) -> None:
        weights = named_full_parameters(self.model)
        for name, value in before.items():
            weights[name].copy_(value)
        for name in self.lora if before else ():
            self.model.get_submodule(name).merged_adapters.clear()


def _check_held(name: str, weight: Tensor, stored: Tensor) -> None:
    """Refuse a weight that is too large for its type.

    Raises:
        HealingError: if it is.
    """
    if not stored.isfinite().all():
        raise HealingError(
            f"{name}: trained to {float(weight.abs().max()):.3g}, which is too large for "
            f"{str(stored.dtype).removeprefix('torch.')}, the type to store it in. Use a lower "
            "learning_rate, or `store_dtype: float32`."
        )


def _copy(weight: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """Return a copy in main memory; of a sharded weight, a copy of the shard on its device."""
    if isinstance(weight, DTensor):
        return weight.detach().clone()
    return weight.detach().to("cpu", dtype, copy=True)


def keep_activations(model: Any, *, keep: bool) -> None:
    """Switch gradient checkpointing off or on, in place."""
    # transformers 5.22 renamed it.
    old, new = "gradient_checkpointing", "activation_checkpointing"
    name = new if hasattr(model, f"{new}_enable") else old
    if keep:
        if getattr(model, f"is_{name}", False):
            getattr(model, f"{name}_disable")()
    else:
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})


def changed_modules(model: nn.Module, narrowed: Iterable[str] = ()) -> list[str]:
    """Return the names of the modules that the recipe changed.

    Args:
        model: slim, or ordinary with narrowed MLPs.
        narrowed: names of dense maps with other sizes than in the source model, which the model
            itself does not show.
    """
    sites = (getattr(model.config, "llmslim", None) or {}).get("sites", {})
    known = {*sites, *narrowed}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, StructuredLinear) or name in known
    ]


def make_trainable(model: Any, spec: Heal, narrowed: Iterable[str] = ()) -> Trainable:
    """Choose what to train and convert the parameters to float32, in place.

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
    lora = _dense_maps(model, modules) if spec.train == "lora" else ()
    if spec.train == "lora" and not lora and not modules:
        raise HealingError("heal.train: lora, but the model has no dense maps. Train `all`.")
    given = {name: parameter.dtype for name, parameter in model.named_parameters()}
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    wanted = None if spec.store_dtype is None else getattr(torch, spec.store_dtype)
    device = model.device
    if wanted is not None:  # buffers are stored too
        for name, buffer in model.named_buffers():
            if name in model.state_dict() and buffer.is_floating_point():
                buffer.data = buffer.data.to(wanted)
    for parameter in model.parameters():
        parameter.requires_grad_(spec.train == "all")
        if parameter.element_size() < 4:
            parameter.data = parameter.data.float()
    _add_lora(model, lora, spec)
    changed = frozenset(
        f"{name}.{inner}"
        for name in modules
        for inner, _ in model.get_submodule(name).named_parameters()
    )
    for name, parameter in model.named_parameters():
        if name in changed:
            parameter.requires_grad_(requires_grad=True)
    stored = {name: wanted or dtype for name, dtype in given.items()}
    return Trainable(model, changed, given, stored, gradients, device, spec.seed, lora)


def _dense_maps(model: Any, changed: list[str]) -> tuple[str, ...]:
    """Return the dense maps of the decoder layers that the recipe did not change.

    Raises:
        HealingError: if the model has no list of decoder layers.
    """
    try:
        stack = find_layers(model).path
    except TargetError as error:
        raise HealingError(
            f"heal.train: lora, but {type(model).__name__} has no list of decoder layers, which "
            "LoRA needs. Train `all`."
        ) from error
    inside = tuple(f"{name}." for name in changed)
    return tuple(
        name
        for name in find_sites(model)
        if name.startswith(f"{stack}.") and name not in changed and not name.startswith(inside)
    )


def _add_lora(model: Any, names: tuple[str, ...], spec: Heal) -> None:
    """Add LoRA matrices to dense maps, in place; they change nothing before training.

    Raises:
        HealingError: if peft does not support one of the maps.
    """
    if not names:
        return
    from peft import LoraConfig, inject_adapter_in_model

    stack = find_layers(model).path
    inside = [name.removeprefix(f"{stack}.") for name in names]
    config = LoraConfig(
        r=spec.lora_rank,
        lora_alpha=ALPHA_PER_RANK * spec.lora_rank,
        # A pattern, since a list would match the ends of names.
        target_modules="|".join(map(re.escape, inside)),
        fan_in_fan_out=type(model.get_submodule(names[0])).__name__ == "Conv1D",
    )
    torch.manual_seed(spec.seed)  # one of the two matrices is random
    # Only the layers: peft treats whole models by family, with other names for their modules.
    inject_adapter_in_model(config, model.get_submodule(stack))
    without = [name for name in names if not hasattr(model.get_submodule(name), "merge")]
    if without:
        raise HealingError(
            f"heal.train: lora, which peft does not support for {without[0]}. Train `all` or "
            "`blocks`."
        )
