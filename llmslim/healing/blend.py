"""Let dense projections carry the model while their blocks learn: self-guided training.

    y = a dense(x) + (1 - a) block(x)      a falls from 1 to 0 by half a cosine

(Wei et al. 2024, https://arxiv.org/abs/2406.16450). The dense projections are the teacher's, and
frozen. Gradients pass through both to what comes before. All of it is a forward hook on every
block: the model, its names and its checkpoints are what they would be without. In evaluation mode
the hooks do nothing, so what is measured and written is always the plain model.

An MLP with another number of neurons than the teacher's has no dense projection of its sizes to go
with: there the whole MLP's output is blended with that of the teacher's MLP.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.errors import HealingError
from llmslim.healing.phases import paired_layers
from llmslim.healing.restoring import to_compute
from llmslim.modeling.structured import StructuredLinear
from llmslim.surgery.sites import as_site, find_layers


class Blend:
    """Dense modules beside the slim ones that took their place, for the first steps.

    Args:
        model: in training.
        teacher: the dense model.
        which: which of the teacher's layers each layer stands for; the same by default.
        changed: names of the modules that surgery changed.
        end: the first step without any of it.
        apart: whether to copy the dense modules, for a teacher that will be released.

    Raises:
        HealingError: if there is nothing to blend, or a dense module is not to be found.
    """

    def __init__(
        self,
        model: Any,
        teacher: Any,
        which: Sequence[int] | None,
        changed: Iterable[str],
        *,
        end: int,
        apart: bool = False,
    ) -> None:
        pairs = blended(model, teacher, which, changed)
        self.end = end
        self.alpha = 0.0
        self.dense = {
            name: copy.deepcopy(dense) if apart else dense for name, dense in pairs.items()
        }
        self._handles = [
            model.get_submodule(name).register_forward_hook(self._mixed(name), with_kwargs=True)
            for name in pairs
        ]

    def at(self, step: int) -> None:
        """Set the share of the dense modules to that of a step, counted from 0."""
        self.alpha = share_at(step, self.end)
        if self.alpha == 0:
            self.remove()

    def to(self, device: torch.device, *, bf16: bool) -> None:
        """Move the dense modules, and widen them unless the arithmetic is bfloat16."""
        for dense in self.dense.values():
            to_compute(dense, device, bf16=bf16)

    def remove(self) -> None:
        """Leave the model as it was without, and let go of the dense modules."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.dense, self.alpha = [], {}, 0.0

    def _mixed(self, name: str) -> Callable[..., Tensor | None]:
        def mix(
            module: nn.Module, given: tuple[Any, ...], options: dict[str, Any], output: Any
        ) -> Tensor | None:
            if not module.training or self.alpha == 0:
                return None
            dense = self.dense[name](*given, **options)
            if not isinstance(output, Tensor) or not isinstance(dense, Tensor):
                raise HealingError(
                    f"heal.blend_share: {name} returns more than one tensor and cannot be blended. "
                    "Leave blend_share out."
                )
            return self.alpha * dense + (1 - self.alpha) * output

        return mix


def share_at(step: int, end: int) -> float:
    """Return the share of the dense modules in a step, counted from 0.

    Example:
        >>> [round(share_at(step, 4), 3) for step in (0, 1, 2, 3, 4)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    return (1 + math.cos(math.pi * step / end)) / 2 if step < end else 0.0


def blended(
    model: Any, teacher: Any, which: Sequence[int] | None, changed: Iterable[str]
) -> dict[str, nn.Module]:
    """Return the teacher's module for every module to blend, by the name of the latter.

    Args:
        model: slim.
        teacher: dense.
        which: which of the teacher's layers each layer stands for; the same by default.
        changed: names of the modules that surgery changed.

    Raises:
        HealingError: if there are none, or the teacher lacks one.
    """
    layers = paired_layers(
        model, teacher, which, key="heal.blend_share", instead="Leave blend_share out."
    )
    stack = find_layers(model)

    def in_teacher(name: str) -> nn.Module | None:
        index = stack.index_of(name)
        try:
            if index is None:
                found: nn.Module = teacher.get_submodule(name)
                return found
            inside = name.removeprefix(f"{stack.path}.{index}").removeprefix(".")
            return layers[index][1].get_submodule(inside)
        except AttributeError:
            return None

    found: dict[str, nn.Module] = {}
    for name in changed:
        dense = in_teacher(name)
        if dense is not None and _sizes(dense) == _sizes(model.get_submodule(name)):
            found[name] = dense
            continue
        parent = name.rpartition(".")[0]
        dense = in_teacher(parent)
        # Where projections lie in the layer itself, that layer is more than an MLP.
        alone = parent and model.get_submodule(parent) not in [ours for ours, _ in layers]
        if dense is None or not alone:
            raise HealingError(
                f"heal.blend_share: {name}: the teacher has no module of its sizes, and no MLP "
                "that could stand for it. Leave blend_share out."
            )
        found[parent] = dense
    if not found:
        raise HealingError(
            "heal.blend_share: this model has no structured blocks and no narrowed MLPs, so there "
            "is nothing to blend. Leave blend_share out."
        )
    inner = {name for name in found if any(name.startswith(f"{outer}.") for outer in found)}
    return {name: dense for name, dense in found.items() if name not in inner}


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return a projection's input and output channels, None for any other module."""
    if isinstance(module, StructuredLinear):
        return module.in_features, module.out_features
    site = as_site("", module)
    return None if site is None else (site.in_features, site.out_features)
