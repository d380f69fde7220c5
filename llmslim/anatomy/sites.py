"""Find a model's dense maps, decoder layers and MLPs in any architecture.

No model family is listed. A site is a module that is a dense map (`nn.Linear`, or GPT-2's
transposed `Conv1D`), or a parameter that stacks one for each expert; the decoder layers are the
module list whose length is the config's number of layers; an MLP is a group of sites in one layer
whose sizes fit each other.

Shapes: E = experts, I = in_features, O = out_features, M = neurons, D = hidden size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Conv1D, PreTrainedModel

from llmslim.anatomy.elementwise import has_independent_neurons
from llmslim.anatomy.module_kinds import is_dense_map, obstacle, serves_router_or_norm, token_mixer
from llmslim.errors import TargetError
from llmslim.modeling.experts import Experts
from llmslim.modeling.structured import StructuredLinear


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

    def layer_of(self, name: str) -> str | None:
        """Return the name of the decoder layer around a module, None for modules outside."""
        index = self.index_of(name)
        layer = f"{self.path}.{index}"
        return layer if index is not None and name.startswith(f"{layer}.") else None

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
    """Name of the innermost module around them all."""
    width: int
    """Number of neurons."""
    up: tuple[str, ...]
    """Sites that produce the neurons: one, a gate and an up, or both fused in one."""
    down: str
    """The site that reads the neurons."""
    fused: bool
    """Whether `up` is one site that holds gate and up, one after the other."""
    follow: tuple[tuple[str, str], ...] = ()
    """Attributes that hold the number of neurons, where it follows the config: module and name."""


def as_site(name: str, module: nn.Module) -> Site | None:
    """Return a module as a site, None if it is not a dense map."""
    if isinstance(module, nn.Linear) and is_dense_map(type(module)):
        outputs, inputs = module.weight.shape  # what a module calls its sizes may be tensors
        return Site(name, inputs, outputs, module.bias is not None)
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return Site(name, in_features, out_features, module.bias is not None)
    return None


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module with its name, blocks included, but nothing that is inside a block."""
    block = None
    for name, module in model.named_modules():
        if block is None or not name.startswith(f"{block}."):
            yield name, module
            block = name if isinstance(module, StructuredLinear) else None


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Return every dense map that can be replaced by name, in the model's order; no experts."""
    return {site.name: site for site, reason in _dense_maps(model) if not reason}


def find_fixed(model: nn.Module) -> dict[str, str]:
    """Return every dense map that must stay as it is by name, and why."""
    return {site.name: reason for site, reason in _dense_maps(model) if reason}


def find_experts(model: nn.Module) -> dict[str, Site]:
    """Return every parameter that stacks the dense maps of experts by name, in their order."""
    found = {}
    for name, module in model.named_modules():
        if "expert" not in type(module).__name__.lower() or isinstance(module, Experts):
            continue  # blocks of experts are no dense maps
        stacks = {k: p for k, p in module.named_parameters(recurse=False) if p.dim() == 3}
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
    for name, module in outer_modules(model):
        site = as_site(name, module)
        if site and id(module.weight) not in met:
            met.add(id(module.weight))
            yield site, obstacle(modules, name, choices) or ""


def _is_transposed(module: nn.Module, stacks: dict[str, nn.Parameter]) -> bool:
    """Return whether stacked matrices are (E, I, O)."""
    known = getattr(module, "is_transposed", None)  # where transformers offers fused kernels
    if isinstance(known, bool):
        return known
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


def find_towers(model: Any) -> tuple[str, ...]:
    """Return the names, each with a dot at its end, of the models inside that read no tokens.

    They are encoders of images or sound, and what leads from those to the text decoder: they take
    another input, or have a config that is neither the model's own nor its text decoder's.
    """
    config = model.config
    text = config.get_text_config()
    known = (type(config), type(text))
    return tuple(
        f"{name}."
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel) and type(module.config) not in known
        if text is not config or module.main_input_name != "input_ids"
    )


def find_layers(model: Any) -> Layers:
    """Return the stack of decoder layers.

    Args:
        model: a causal language model with a transformers config.

    Raises:
        TargetError: if no module list has the config's number of layers.
    """
    config = model.config.get_text_config()
    # Longcat's num_hidden_layers counts attentions, of which each of its layers has two;
    # Blenderbot's the layers of an encoder.
    fields = ("num_hidden_layers", "num_layers", "decoder_layers")
    counts = [getattr(config, field, None) for field in fields]
    hidden = getattr(config, "hidden_size", None)
    # An image encoder may have as many layers as the text decoder, and come first.
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = set() if decoder is None else {id(module) for module in decoder.modules()}
    towers = find_towers(model)
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in counts
    ]

    def rank(found: tuple[str, nn.ModuleList]) -> tuple[bool, bool, bool, int, bool]:
        name, stack = found
        return (
            name.startswith(towers),
            hidden not in {_in_features_of(module) for module in stack.modules()},
            "encoder" in name.split("."),  # where there is a decoder as well
            counts.index(len(stack)),
            id(stack) not in inside,
        )

    for name, module in sorted(stacks, key=rank):
        return Layers(name, len(module))
    raise TargetError(
        f"{type(model).__name__}: no module list of {counts[0]} decoder layers; depth and width "
        "need one."
    )


def _in_features_of(module: nn.Module) -> int | None:
    """Return how many features a dense map or a block takes, None for other modules."""
    if isinstance(module, StructuredLinear):
        return module.in_features
    site = as_site("", module)
    return None if site is None else site.in_features


def find_mlps(model: Any, layers: Layers) -> list[Mlp]:
    """Return the MLP of every decoder layer that has one, found by its sizes.

    Where a layer has several candidates, the widest are MLPs: narrower ones, such as Gemma 3n's
    inputs for each layer, only have similar sizes. Neurons that other modules have parameters for
    (an inner norm, the adapters of Zamba 2) cannot be removed, so their MLPs are left out.

    Args:
        model: a causal language model.
        layers: its decoder layers.
    """
    hidden = model.config.get_text_config().hidden_size
    modules = dict(model.named_modules())
    by_layer: dict[str, list[Site]] = defaultdict(list)
    fixed = set()
    for site, reason in _dense_maps(model):
        top = layers.layer_of(site.name)
        if top and not token_mixer(modules, site.name, top):
            by_layer[top].append(site)
            fixed |= {site.name} if reason else set()
    found = []
    for top, sites in by_layer.items():
        served = [site for site in sites if not serves_router_or_norm(modules, site.name, top)]
        for group in widest(find_groups(top, served, hidden)):
            mlp = _as_mlp(group)
            if mlp and not fixed & {*mlp.up, mlp.down} and _owns_neurons(modules, top, mlp):
                found.append(mlp)
    return found


@dataclass(frozen=True)
class Group:
    """Dense maps, or stacks of them, that have the sizes of one MLP."""

    holder: str
    """Name of the innermost module around them all."""
    up: tuple[Site, ...]
    down: Site


def find_groups(top: str, sites: Iterable[Site], hidden: int | None) -> list[Group]:
    """Return the groups of sites with the sizes of an MLP, those of inner modules first.

    Args:
        top: name of the module around all of them.
        sites: to group, in the model's order.
        hidden: what an MLP reads and writes; None for any size.
    """
    rest = list(sites)
    holders = {
        ".".join(parts[:n]): n
        for parts in (site.name.split(".") for site in rest)
        for n in range(top.count(".") + 1, len(parts))
    }
    found = []
    for holder in sorted(holders, key=lambda name: -holders[name]):
        inside = [site for site in rest if site.name.startswith(f"{holder}.")]
        # Most declare the projection that reads the neurons last; some between gate and up.
        likeliest = inside[::-1]
        likeliest.sort(key=lambda site: "down" not in site.name)
        for down in likeliest:
            up = tuple(site for site in inside if site is not down and _feeds(site, down))
            if up and hidden in (None, down.out_features):
                found.append(Group(holder, up, down))
                rest = [site for site in rest if site not in (*up, down)]
                break
    return found


def _feeds(up: Site, down: Site) -> bool:
    """Return whether one site's sizes let it produce the neurons that another one reads."""
    produced = (down.in_features, 2 * down.in_features)
    return up.in_features == down.out_features and up.out_features in produced


def widest(groups: list[Group]) -> list[Group]:
    """Return the groups with the most neurons."""
    most = max((group.down.in_features for group in groups), default=0)
    return [group for group in groups if group.down.in_features == most]


def _as_mlp(group: Group) -> Mlp | None:
    """Return a group as an MLP, None where its sizes are ambiguous."""
    width = group.down.in_features
    sizes = [site.out_features for site in group.up]
    if sizes not in ([width], [width, width], [2 * width]):
        return None
    return Mlp(
        name=group.holder,
        width=width,
        up=tuple(site.name for site in group.up),
        down=group.down.name,
        fused=sizes == [2 * width],
    )


def _owns_neurons(modules: dict[str, nn.Module], top: str, mlp: Mlp) -> bool:
    """Return whether neurons can be removed and repeated.

    No other module may have parameters for each neuron, and no neuron may depend on others.
    """
    widths = {mlp.width, 2 * mlp.width} if mlp.fused else {mlp.width}
    holder = modules[mlp.name]
    if any(
        f"{mlp.name}.{name}".rpartition(".")[0] not in (*mlp.up, mlp.down)
        and widths.intersection(parameter.shape)
        and not token_mixer(modules, f"{mlp.name}.{name}", top)
        for name, parameter in holder.named_parameters()
    ):
        return False
    up, down = [modules[name] for name in mlp.up], modules[mlp.down]
    return has_independent_neurons(holder, up, down, dense_weight(down))
