"""Find a model's dense maps, its decoder layers and its MLPs, whatever the architecture calls them.

Nothing here knows a model family by name. A site is a module that is a dense map (`nn.Linear`, or
GPT-2's transposed `Conv1D`); the decoder layers are the module list as long as the config says; an
MLP is a group of sites with one parent whose sizes fit each other.

Shapes: I = in_features, O = out_features.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmslim.errors import TargetError


@dataclass(frozen=True)
class Site:
    """One dense map of a model."""

    name: str
    in_features: int
    out_features: int
    bias: bool


@dataclass(frozen=True)
class Layers:
    """A model's stack of decoder layers."""

    path: str
    """Name of the module list."""
    count: int

    def index_of(self, name: str) -> int | None:
        """Return the decoder layer that a module belongs to, None for modules outside."""
        rest = name.removeprefix(self.path + ".")
        return None if rest == name else int(rest.partition(".")[0])

    def renamed(self, name: str, new_index: dict[int, int]) -> str:
        """Return a module's name once layers have moved to their new indices."""
        index = self.index_of(name)
        if index is None:
            return name
        old = f"{self.path}.{index}"
        return f"{self.path}.{new_index[index]}{name[len(old) :]}"


@dataclass(frozen=True)
class Mlp:
    """The sites that make one MLP."""

    name: str
    """Name of the module that holds them."""
    width: int
    """Number of neurons."""
    up: tuple[str, ...]
    """Sites that produce the neurons: one, a gate and an up, or both fused in one."""
    down: str
    """The site that reads the neurons."""
    fused: bool
    """Whether `up` is one site that holds gate and up, one after the other."""


def as_site(name: str, module: nn.Module) -> Site | None:
    """Return a module as a site, None if it is not a dense map."""
    if isinstance(module, nn.Linear):
        return Site(name, module.in_features, module.out_features, module.bias is not None)
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return Site(name, in_features, out_features, module.bias is not None)
    return None


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Return every dense map of a model by name, in the model's order."""
    found = (as_site(name, module) for name, module in model.named_modules())
    return {site.name: site for site in found if site}


def dense_weight(module: nn.Module) -> Tensor:
    """Return a site's weight the way `nn.Linear` holds it, (O, I), as a view."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    return weight.t() if isinstance(module, Conv1D) else weight


def find_layers(model: Any) -> Layers:
    """Return the stack of decoder layers.

    Args:
        model: a causal language model with a transformers config.

    Raises:
        TargetError: if no module list is as long as the config says.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return Layers(name, count)
    raise TargetError(
        f"{type(model).__name__}: no module list of {count} decoder layers; depth and width "
        "need one."
    )


def find_mlps(model: Any, layers: Layers) -> list[Mlp]:
    """Return the MLP of every decoder layer that has one, found by its sizes.

    Args:
        model: a causal language model.
        layers: its decoder layers.
    """
    hidden = model.config.get_text_config().hidden_size
    by_parent: dict[str, list[Site]] = defaultdict(list)
    for site in find_sites(model).values():
        if layers.index_of(site.name) is not None:
            by_parent[site.name.rpartition(".")[0]].append(site)
    found = (_as_mlp(parent, sites, hidden) for parent, sites in by_parent.items())
    return [mlp for mlp in found if mlp]


def _as_mlp(parent: str, sites: list[Site], hidden: int) -> Mlp | None:
    """Return sites of one parent as an MLP, None where their sizes do not make one."""
    # Attention with equal sizes everywhere would pass for an MLP by its shapes alone.
    if "attn" in parent.rpartition(".")[2] or "attention" in parent.rpartition(".")[2]:
        return None
    # Most declare the projection that reads the neurons last; some between gate and up.
    for down in reversed(sites):
        up = [site for site in sites if site is not down]
        width = down.in_features
        sizes = [site.out_features for site in up]
        fits = down.out_features == hidden and all(site.in_features == hidden for site in up)
        if fits and sizes in ([width], [width, width], [2 * width]):
            return Mlp(
                name=parent,
                width=width,
                up=tuple(site.name for site in up),
                down=down.name,
                fused=sizes == [2 * width],
            )
    return None
