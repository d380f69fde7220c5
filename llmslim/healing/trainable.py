"""What is trained: which parameters, in which group, and LoRA on what stayed dense.

- `blocks`: what surgery changed, blocks and narrowed MLPs, and nothing else.
- `all`: every parameter.
- `lora`: what surgery changed in full, and LoRA matrices beside every dense map inside the decoder
  layers that it left. They are multiplied out at the end: a healed model has no LoRA in it.

Parameters are float32 while they are trained, whatever the checkpoint stores; `rounding.py` is
how they become its type again. Every measurement is of the model as it would be stored.
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
    """A model that was made ready for training, and how to undo that."""

    model: Any
    changed: frozenset[str]
    """Names of parameters that belong to what surgery changed."""
    given: dict[str, torch.dtype]
    """Types that parameters had, by the names they had."""
    stored: dict[str, torch.dtype]
    """Types that they are stored in."""
    gradients: dict[str, bool]
    """Whether parameters wanted gradients before, by name."""
    device: torch.device
    """Where they were."""
    seed: int
    """Of chance in rounding."""
    lora: tuple[str, ...] = field(default=())
    """Names of dense maps with LoRA beside them."""
    _final: bool = field(default=False)

    def count(self) -> int:
        """Return how many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def rounds_to(self) -> tuple[str, ...]:
        """Names of the types that anything is rounded to, sorted."""
        types = {self.stored[name] for name, _ in self._rounding()}
        return tuple(sorted(str(one).removeprefix("torch.") for one in types))

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Let the model be what would be stored now, in place, for as long as the context lasts.

        What parameters were meanwhile is kept in main memory, where there is most room.

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
        """Make the model for good what is stored, in place: LoRA multiplied out, all rounded.

        Types stay those of the training.

        Raises:
            HealingError: if a weight is too large for its type.
        """
        if not self._final:
            self._store(keep=False)
            self._final = True

    @torch.no_grad()
    def release(self) -> None:
        """Undo what training did to the model besides training it, in place; finalise it.

        Every parameter gets the type it is stored in.
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
        """Return the parameters that storing rounds, and whether they moved.

        Each goes by the name that it had, and the name that it has beside LoRA.
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
        """Multiply LoRA out and round; return what parameters were, if that is to be kept."""
        before = {}
        weights = named_full_parameters(self.model)
        rounds = self._rounding()
        if keep:
            # What LoRA is merged into was not trained: the type that it had holds it.
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
    """Refuse a weight that its type cannot hold.

    Raises:
        HealingError: if there are such numbers in it.
    """
    if not stored.isfinite().all():
        raise HealingError(
            f"{name}: trained to {float(weight.abs().max()):.3g}, which is too large for "
            f"{str(stored.dtype).removeprefix('torch.')}, the type it is stored in. Take a lower "
            "learning_rate, or `store_dtype: float32`."
        )


def _copy(weight: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """Return a copy in main memory; of a weight in pieces, a copy of the piece where it is."""
    if isinstance(weight, DTensor):
        return weight.detach().clone()
    return weight.detach().to("cpu", dtype, copy=True)


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


def make_trainable(model: Any, spec: Heal, narrowed: Iterable[str] = ()) -> Trainable:
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
    lora = _dense_maps(model, modules) if spec.train == "lora" else ()
    if spec.train == "lora" and not lora and not modules:
        raise HealingError("heal.train: lora, but the model has no dense maps. Train `all`.")
    given = {name: parameter.dtype for name, parameter in model.named_parameters()}
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    wanted = None if spec.store_dtype is None else getattr(torch, spec.store_dtype)
    device = model.device
    if wanted is not None:  # buffers are no less a part of what is stored
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
    """Return the dense maps inside the decoder layers that surgery left as they were.

    Raises:
        HealingError: if the model has no list of such layers.
    """
    try:
        stack = find_layers(model).path
    except TargetError as error:
        raise HealingError(
            f"heal.train: lora, but {type(model).__name__} has no list of decoder layers, whose "
            "dense maps it is for. Train `all`."
        ) from error
    inside = tuple(f"{name}." for name in changed)
    return tuple(
        name
        for name in find_sites(model)
        if name.startswith(f"{stack}.") and name not in changed and not name.startswith(inside)
    )


def _add_lora(model: Any, names: tuple[str, ...], spec: Heal) -> None:
    """Put LoRA matrices beside dense maps, in place; they compute nothing yet.

    Raises:
        HealingError: if peft leaves one of them without.
    """
    if not names:
        return
    from peft import LoraConfig, inject_adapter_in_model

    stack = find_layers(model).path
    inside = [name.removeprefix(f"{stack}.") for name in names]
    config = LoraConfig(
        r=spec.lora_rank,
        lora_alpha=ALPHA_PER_RANK * spec.lora_rank,
        # A pattern, since a plain list matches names by their ends.
        target_modules="|".join(map(re.escape, inside)),
        fan_in_fan_out=type(model.get_submodule(names[0])).__name__ == "Conv1D",
    )
    torch.manual_seed(spec.seed)  # one of the two matrices is random
    # The layers alone: of a whole model peft knows the family, and other names for its parts.
    inject_adapter_in_model(config, model.get_submodule(stack))
    without = [name for name in names if not hasattr(model.get_submodule(name), "merge")]
    if without:
        raise HealingError(
            f"heal.train: lora, but peft puts none beside {without[0]}. Train `all` or `blocks`."
        )
