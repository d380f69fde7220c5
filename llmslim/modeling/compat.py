"""What the modeling files use of transformers beside its documented interface.

Everything of that kind is in this file, or in `llmslim/compat.py` where only the installed package
needs it; `tests/test_modeling_compat.py` holds each of them against the installed transformers.

These files travel inside checkpoints: they import torch and transformers only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import moe

ACTIVATIONS: Any = ACT2FN
"""transformers' activations by the names that configs use; it exports no other table of them."""
_BY_EXPERT: Any = torch.ops.transformers.grouped_mm_fallback
INITIALIZED = "_is_hf_initialized"
"""Mark of a module or tensor that loading must draw no weights into."""
GROUPED_PRODUCTS: tuple[Any, ...] = (
    getattr(nn.functional, "grouped_mm", None),  # as old as torch 2.10
    getattr(torch, "_grouped_mm", None),
    _BY_EXPERT,
    _BY_EXPERT.default,
)
"""All by which transformers multiplies rows sorted by expert with a stack of matrices."""


def mark_initialized(item: Any) -> None:
    """Keep transformers from drawing new weights into a module or tensor, in place.

    Loading initialises every module that is not marked, also where no weight of it is missing.
    """
    setattr(item, INITIALIZED, True)


class Initialized:
    """Base of modules that are always marked as `mark_initialized` does: in a class, to stay."""

    _is_hf_initialized = True


def build_from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
    """Return a model of a class; only Auto classes have a public method that does so.

    Args:
        cls: a model class.
        config: of it.
        **kwargs: `dtype` and the like.
    """
    return cls._from_config(config, **kwargs)


def model_mapping(auto: Any) -> Any:
    """Return the model classes that an Auto class knows, by config class: one, or a tuple."""
    return auto._model_mapping


class ExpertsConfig:
    """A config for one module of experts, which cannot be run in every way that the model's can.

    The module is run as the model's config says where it can be, and one by one elsewhere. The
    public setter changes the model's config, which this one follows.

    Args:
        config: the model's.
        answered: how the module's experts can be run beside one by one.
    """

    def __init__(self, config: Any, answered: tuple[str, ...]) -> None:
        self.config, self.answered = config, answered

    @property
    def _experts_implementation(self) -> str:
        chosen = getattr(self.config, "_experts_implementation", None)
        return chosen if chosen in self.answered else "eager"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "config":  # not there while it is copied
            raise AttributeError(name)
        return getattr(self.config, name)


def grouped_product(x_NK: Tensor, weight_EKO: Tensor, end_E: Tensor) -> Tensor:
    """Multiply rows that are sorted by expert, each with its expert's matrix.

    transformers' own function chooses between torch's product and its fallback, but not by sizes,
    and knows no autocast.

    Args:
        x_NK: rows.
        weight_EKO: a matrix for each expert, perhaps transposed.
        end_E: where each expert's rows end, int32.
    """
    kind = x_NK.device.type
    if torch.is_autocast_enabled(kind) and weight_EKO.dtype == torch.float32:
        weight_EKO = weight_EKO.to(torch.get_autocast_dtype(kind))
    # torch's product wants rows that begin at multiples of 16 bytes, in its gradients, too.
    steps = (*weight_EKO.shape[1:], x_NK.stride(0), weight_EKO.stride(0))
    aligned = all(step * weight_EKO.element_size() % 16 == 0 for step in steps)
    y: Tensor
    if aligned and weight_EKO.dtype != torch.float64:
        y = moe._grouped_mm(x_NK, weight_EKO, offs=end_E)
    else:
        y = _BY_EXPERT(x_NK.to(weight_EKO.dtype), weight_EKO, offs=end_E)
    return y


def place_buffers(block: nn.Module) -> None:
    """Give a block real buffers, in place, where only parameters are to be on the meta device.

    transformers builds all of a model on the meta device; vLLM's Transformers backend has new
    tensors in memory, moves the parameters alone, and loads what the files hold into both.
    """
    if torch.get_default_device().type == "meta":
        return
    for module in block.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device=torch.get_default_device()))


def _plans_by_name() -> bool:
    """Return whether transformers resolves a parallel plan to a style for each module."""
    # Imported here: this file is read while transformers reads the module of its models.
    from transformers import PreTrainedModel
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    return hasattr(PreTrainedModel, "_resolve_parallel_plans") and (
        "local_params" in ALL_PARALLEL_STYLES
    )


class Distributed:
    """What a model class does to change the parallel plans that transformers resolves.

    The plan of a config has one name for a projection of all layers (`layers.*.mlp.up_proj`), of
    which only some may be blocks. When a model is loaded, transformers makes one of full names.
    """

    plan_of_blocks: Callable[[dict[str, str], int], dict[str, str]]
    """From the styles of the dense model's modules and parameters, each by its full name, and the
    number of devices that share a layer, to the plan to go by; a method of the model class."""

    def _resolve_parallel_plans(self, distributed_config: Any) -> tuple[dict[str, str], ...]:
        tensors, experts, *others = super()._resolve_parallel_plans(distributed_config)  # type: ignore[misc]
        return (
            self.plan_of_blocks(tensors, distributed_config.tp_size),
            self.plan_of_blocks(experts, distributed_config.ep_size),
            *others,
        )

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """Shard a model as the base class does.

        Raises:
            ValueError: if this transformers has no styles for single modules.
        """
        shards = mesh_manager is not None and (
            max(distributed_config.tp_size, distributed_config.ep_size) > 1
        )
        if shards and not _plans_by_name():
            raise ValueError(
                f"transformers {transformers.__version__} shards no slim model (tensor or expert "
                "parallelism). Install transformers 5.23 or newer."
            )
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)  # type: ignore[misc]


def is_built_by_vllm(model: Any) -> bool:
    """Return whether vLLM's Transformers backend is building a model."""
    return getattr(model.config, "_attn_implementation", None) in ("vllm", "vllm_mla")


def devices_of_vllm() -> int:
    """Return how many devices share each layer of the models that vLLM builds."""
    devices: int = sys.modules["vllm.distributed"].get_tensor_model_parallel_world_size()
    return devices


_apart: dict[tuple[type, frozenset[str]], type] = {}


def keep_apart(model: Any, names: Iterable[str]) -> None:
    """Give modules that hold blocks classes of their own, in place, where vLLM builds the model.

    Its Transformers backend looks at one module of a class, and then joins projections in all of
    that class whose parts have the same names, whatever these parts are.

    Args:
        model: on its way to be a slim model.
        names: of its blocks.
    """
    if not is_built_by_vllm(model):
        return
    holders: dict[str, set[str]] = {}
    for name in names:
        holder, _, leaf = name.rpartition(".")
        holders.setdefault(holder, set()).add(leaf)
    for holder, leaves in holders.items():
        module = model.get_submodule(holder)
        if module is not model:
            cls = type(module)
            own = _apart.setdefault((cls, frozenset(leaves)), type(cls.__name__, (cls,), {}))
            module.__class__ = own


def class_of_transformers(name: str, kind: type) -> Any:
    """Return a class that transformers exports.

    Raises:
        AttributeError: if it exports none of that name which derives from `kind`.
    """
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, kind):
        raise AttributeError(f"transformers has no {kind.__name__} {name!r}")
    return found
