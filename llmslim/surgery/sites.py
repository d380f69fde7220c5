"""Find a model's dense maps, its decoder layers and its MLPs, whatever the architecture calls them.

Nothing here knows a model family by name. A site is a module that is a dense map (`nn.Linear`, or
GPT-2's transposed `Conv1D`), or a parameter that stacks one for each expert; the decoder layers are
the module list as long as the config says; an MLP is a group of sites with one parent whose sizes
fit each other.

Shapes: E = experts, I = in_features, O = out_features, M = neurons, D = hidden size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmslim.errors import TargetError
from llmslim.surgery.elementwise import has_independent_neurons
from llmslim.surgery.natures import is_dense_map, mixes_tokens, obstacle


@dataclass(frozen=True)
class Site:
    """One dense map of a model."""

    name: str
    in_features: int
    out_features: int
    bias: bool
    experts: int = 0
    """How many matrices a parameter stacks; 0 for a module, which is one matrix."""
    transposed: bool = False
    """Whether such a parameter is (E, I, O) and not (E, O, I)."""


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
    follow: tuple[tuple[str, str], ...] = ()
    """Attributes that say how many neurons there are, where the config says so: module and name."""


def as_site(name: str, module: nn.Module) -> Site | None:
    """Return a module as a site, None if it is not a dense map."""
    if isinstance(module, nn.Linear) and is_dense_map(type(module)):
        return Site(name, module.in_features, module.out_features, module.bias is not None)
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return Site(name, in_features, out_features, module.bias is not None)
    return None


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Return every dense map that can be exchanged by name, in the model's order; no experts."""
    return {site.name: site for site, reason in _dense_maps(model) if not reason}


def find_fixed(model: nn.Module) -> dict[str, str]:
    """Return every dense map that must stay as it is by name, and why."""
    return {site.name: reason for site, reason in _dense_maps(model) if reason}


def find_experts(model: nn.Module) -> dict[str, Site]:
    """Return every parameter that stacks the dense maps of experts by name, in their order."""
    found = {}
    for name, module in model.named_modules():
        if "expert" not in type(module).__name__.lower():
            continue
        stacks = {k: p for k, p in module._parameters.items() if p is not None and p.dim() == 3}
        transposed = _is_transposed(module, stacks)
        for leaf, parameter in stacks.items():
            experts, *sizes = parameter.shape
            inputs, outputs = sizes if transposed else reversed(sizes)
            full_name = f"{name}.{leaf}"
            found[full_name] = Site(full_name, inputs, outputs, False, experts, transposed)
    return found


def _dense_maps(model: nn.Module) -> Iterator[tuple[Site, str]]:
    """Yield every dense map, tied ones once, and why it must stay as it is, if it must."""
    modules = dict(model.named_modules())
    # The router lies beside the module of the experts, or in a module beside it.
    choices = {s.name.rsplit(".", 2)[0]: s.experts for s in find_experts(model).values()}
    met: set[int] = set()
    for name, module in modules.items():
        site = as_site(name, module)
        if site and id(module.weight) not in met:
            met.add(id(module.weight))
            yield site, obstacle(modules, name, choices) or ""


def _is_transposed(module: nn.Module, stacks: dict[str, nn.Parameter]) -> bool:
    """Return whether stacked matrices are (E, I, O)."""
    told = getattr(module, "is_transposed", None)  # where transformers offers fused kernels
    if isinstance(told, bool):
        return told
    down = next((p.shape for leaf, p in stacks.items() if "down" in leaf), None)
    up = next((p.shape for leaf, p in stacks.items() if "down" not in leaf), None)
    if down is None or up is None:
        return False
    # One reads what the other writes: D. Sizes that fit both ways are nn.Linear's way.
    return bool(down[1] != up[2] and down[2] == up[1])


def dense_weight(module: nn.Module) -> Tensor:
    """Return a site's weight the way `nn.Linear` holds it, (O, I), as a view."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    return weight.t() if isinstance(module, Conv1D) else weight


def is_projection(module: nn.Module) -> bool:
    """Return whether a module is one projection, dense or not, and not what holds some."""
    return hasattr(module, "weight") or hasattr(module, "out_features")


def out_features_of(module: Any) -> int:
    """Return how many features a projection gives, dense or not."""
    known = getattr(module, "out_features", None)  # a block's own weight may have any shape
    return int(dense_weight(module).shape[0] if known is None else known)


def find_layers(model: Any) -> Layers:
    """Return the stack of decoder layers.

    Args:
        model: a causal language model with a transformers config.

    Raises:
        TargetError: if no module list is as long as the config says.
    """
    config = model.config.get_text_config()
    # Longcat's num_hidden_layers counts attentions, of which each of its layers has two.
    counts = [getattr(config, field, None) for field in ("num_hidden_layers", "num_layers")]
    # An image encoder may have as many layers as the text decoder, and come first.
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = set() if decoder is None else {id(module) for module in decoder.modules()}
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in counts
    ]

    def rank(found: tuple[str, nn.ModuleList]) -> tuple[int, bool]:
        return counts.index(len(found[1])), id(found[1]) not in inside

    for name, module in sorted(stacks, key=rank):
        return Layers(name, len(module))
    raise TargetError(
        f"{type(model).__name__}: no module list of {counts[0]} decoder layers; depth and width "
        "need one."
    )


def find_mlps(model: Any, layers: Layers) -> list[Mlp]:
    """Return the MLP of every decoder layer that has one, found by its sizes.

    Of several that a layer seems to have, the widest are: what is narrower beside them, such as
    Gemma 3n's inputs for each layer, only has the sizes of one. Neurons that something else has
    parameters for (an inner norm, the adapters of Zamba 2) cannot come and go: theirs are none.

    Args:
        model: a causal language model.
        layers: its decoder layers.
    """
    hidden = model.config.get_text_config().hidden_size
    by_parent: dict[str, list[Site]] = defaultdict(list)
    for site in find_sites(model).values():
        if layers.index_of(site.name) is not None:
            by_parent[site.name.rpartition(".")[0]].append(site)
    by_layer: dict[int | None, list[Mlp]] = defaultdict(list)
    for parent, sites in by_parent.items():
        mlp = None if mixes_tokens(model.get_submodule(parent)) else _as_mlp(parent, sites, hidden)
        if mlp is not None:
            by_layer[layers.index_of(parent)].append(mlp)
    widest = [
        mlp
        for mlps in by_layer.values()
        for mlp in mlps
        if mlp.width == max(other.width for other in mlps)
    ]
    return [mlp for mlp in widest if _owns_neurons(model, layers, mlp)]


def _as_mlp(parent: str, sites: list[Site], hidden: int) -> Mlp | None:
    """Return sites of one parent as an MLP, None where their sizes do not make one."""
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


def _owns_neurons(model: nn.Module, layers: Layers, mlp: Mlp) -> bool:
    """Return whether neurons can come and go.

    That is, nothing beside the projections has parameters for each, and none looks at others.
    """
    if mlp.name.rpartition(".")[0] == layers.path:
        return True  # the projections stand in the decoder layer itself, among attention
    widths = {mlp.width, 2 * mlp.width} if mlp.fused else {mlp.width}
    holder = model.get_submodule(mlp.name)
    if any(
        f"{mlp.name}.{name}".rpartition(".")[0] not in (*mlp.up, mlp.down)
        and widths.intersection(parameter.shape)
        for name, parameter in holder.named_parameters()
    ):
        return False
    up, down = [model.get_submodule(name) for name in mlp.up], model.get_submodule(mlp.down)
    return has_independent_neurons(holder, up, down, dense_weight(down))
