"""Load a slimmed checkpoint as a subclass of the model it was made from.

A slim checkpoint's config.json holds every field of its base config plus

    model_type: llmslim        so that no reader takes it for the dense base model
    base_model_type: llama     which transformers classes to build on
    llmslim: {format: 1, sites: {module name: spec}}

and, with structures of other packages, `plugins: {structure: module that it is from}`. Nothing is
ever imported by the names in there.

`SlimLlamaForCausalLM` derives from `LlamaForCausalLM`, `SlimLlamaModel` from `LlamaModel` and so on
for every class that the base config has: their `__init__` swaps each site for the block that its
spec describes. What is loaded is a LlamaForCausalLM to generate, peft, Trainer and accelerate. Here
these classes are made when they are needed, and found by their names all the same; a checkpoint's
entry file spells out its own.

The original model_type would load too, as a dense model with random weights where the blocks
were: hence the new type, and a load that fails on any missing or left-over weight.

These files travel inside checkpoints: they import torch and transformers only.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .base_class import model_classes
from .checkpoint_code import auto_map, check_plugins, plugin_of, structure_names, write_code
from .compat import (
    Distributed,
    class_of_transformers,
    devices_of_vllm,
    is_built_by_vllm,
    keep_apart,
    mark_initialized,
    place_buffers,
)
from .configuration_llmslim import FORMAT, slim_config_class
from .depth import build_kept, plain_class, restore_original
from .structured import build

_SLIM_FIELDS = ("llmslim", "base_model_type", "auto_map", "model_type", "architectures")
"""Fields of a slim config that its base config does not have, or has otherwise."""


class SlimModelMixin(Distributed):
    """What a slim model does beside its base class: build and shard blocks, refuse half a load."""

    all_tied_weights_keys: dict[str, str]
    base_model_prefix: str

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_plugins(config.llmslim.get("plugins", {}))
        depth = config.llmslim.get("depth")
        if depth:  # see `depth`: the original is built, and layers are taken out of it
            restore_original(config, depth)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        sites = config.llmslim["sites"]
        inner = getattr(self, self.base_model_prefix, None)
        if isinstance(inner, SlimModelMixin):  # built by an Auto class, and slim already
            sites = {name: sites[name] for name in sites if not self._is_inner(name)}
        elif depth:
            build_kept(self, self._named_here(depth))
        here = {self._name_here(name): spec for name, spec in sites.items()}
        replace_sites(self, {name: spec for name, spec in here.items() if name})  # type: ignore[arg-type]
        if is_built_by_vllm(self) and (devices := devices_of_vllm()) > 1:
            shard_in_vllm(self, devices)

    def _is_inner(self, name: str) -> bool:
        return bool(self.base_model_prefix) and name.startswith(f"{self.base_model_prefix}.")

    def _name_here(self, name: str) -> str:
        """Return what a module of the model that was made is called in this one, empty if nothing.

        Configs have the names of the model that was slimmed. The bare model inside it can be loaded
        alone, and with another head.
        """
        bare = name.removeprefix(f"{self.base_model_prefix}.") if self._is_inner(name) else name
        modules = dict(self.named_modules()) | dict(self.named_parameters())  # type: ignore[attr-defined]
        found = next((each for each in (name, bare) if each in modules), "")
        is_made = type(self).__name__ in (self.config.architectures or [])  # type: ignore[attr-defined]
        return found or (name if is_made or self._is_inner(name) else "")

    def _named_here(self, depth: dict[str, Any]) -> dict[str, Any]:
        attributes = {self._name_here(name): each for name, each in depth["attributes"].items()}
        attributes.pop("", None)
        return {**depth, "stack": self._name_here(depth["stack"]), "attributes": attributes}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: `save_pretrained` writes what loads a slim model, however it was loaded."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as the base class does, but fail where weights are missing or left over.

        Raises:
            ValueError: if the files do not hold exactly this model's weights.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, **kwargs, output_loading_info=True)  # type: ignore[misc]
        problems = [
            f"{what}: {', '.join(map(str, sorted(keys)[:5]))}"
            f"{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
            for key, what in (
                ("missing_keys", "missing weights"),
                ("unexpected_keys", "left-over weights"),
                ("mismatched_keys", "weights of another shape"),
            )
            if (keys := [each for each in info.get(key, ()) if not model.may_differ(each)])
        ]
        if problems:
            raise ValueError(f"{args[0]}: not a whole slim checkpoint; {'; '.join(problems)}")
        return (model, info) if wants_info else model

    def may_differ(self, key: str | tuple[Any, ...]) -> bool:
        """Return whether a weight need not be in both: that of a head which only one of them has.

        Args:
            key: as transformers names it after loading; with shapes where these differ.
        """
        name = key if isinstance(key, str) else str(key[0])
        saved = getattr(self.config, "architectures", None) or [type(self).__name__]  # type: ignore[attr-defined]
        is_bare = not hasattr(self, self.base_model_prefix)
        inside = self._is_inner(name) or (is_bare and name in self.state_dict())  # type: ignore[attr-defined]
        return type(self).__name__ not in saved and not inside

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return whether the base class is custom code; transformers treats a slim class alike.

        Otherwise loading would not recompute the tables that some models keep out of their files.
        """
        base: Any = next(
            base
            for base in cls.__mro__
            if issubclass(base, PreTrainedModel) and not issubclass(base, SlimModelMixin)
        )
        return bool(base.is_custom_code())

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """Do as the base class does, which takes all that is tied for parameters.

        Blocks have buffers that are stored, too: a learned order of channels.
        """
        tied = self.all_tied_weights_keys
        buffers = {name for name, _ in self.named_buffers(remove_duplicate=False)}  # type: ignore[attr-defined]
        for name in buffers & tied.keys():
            mark_initialized(self.get_buffer(name))  # type: ignore[attr-defined]
        self.all_tied_weights_keys = {k: v for k, v in tied.items() if k not in buffers}
        try:
            super().mark_tied_weights_as_initialized(loading_info)  # type: ignore[misc]
        finally:
            self.all_tied_weights_keys = tied

    def plan_of_blocks(self, plan: dict[str, str], devices: int) -> dict[str, str]:
        """Return the parallel plan with blocks in the place of projections, see `sharded_plan`.

        Args:
            plan: the styles of the dense model's modules and parameters, each by its full name.
            devices: how many share a layer.
        """
        return sharded_plan(self, plan, devices)[0]  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as the base class does, and the files that load it again beside the weights.

        Raises:
            ValueError: if blocks are quantised: no file format has their codes.
        """
        for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
            if getattr(parameter, "is_in_memory_only", False):
                raise ValueError(
                    f"{name}: quantised in memory; only weights of a floating type are saved. Save "
                    "the model before quantize_blocks, and quantise it again when it is loaded."
                )
        base, config = base_of(self)
        self.config.auto_map = auto_map(base, type(config))  # type: ignore[attr-defined]
        # Names are the module's own: model_type llmslim has no conversion to undo on loading.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            sites = self.config.llmslim["sites"]  # type: ignore[attr-defined]
            write_code(Path(save_directory), set(structure_names(sites)), base, type(config))


_classes: dict[tuple[type, type], Any] = {}
_OF = "_of_"


def slim_model_class(base: Any, config: Any = None) -> Any:
    """Return the slim subclass of a model class.

    Args:
        base: one of transformers' own.
        config: class of its config; some types have one of their own and another type's models.
    """
    config = config or base.config_class
    config_class = slim_config_class(config)
    if (base, config_class) not in _classes:  # making its config class may have made it
        name = f"Slim{base.__name__}"
        # Unpickling finds a class by its full name, everything else by `__name__`.
        full = name if config is base.config_class else f"{name}{_OF}{config.__name__}"
        _classes[base, config_class] = type(
            name,
            (SlimModelMixin, base),
            {
                "__module__": __name__,
                "__qualname__": full,
                "__doc__": f"{base.__name__} with slim blocks.",
                "config_class": config_class,
            },
        )
    if not model_classes(config):
        AutoModelForCausalLM.register(config_class, _classes[base, config_class], exist_ok=True)
    return _classes[base, config_class]


def __getattr__(name: str) -> Any:
    """Return a slim model class by its full name, which unpickling needs; made on first use.

    Raises:
        AttributeError: if transformers has no class to derive it from.
    """
    if name.startswith("Slim"):
        base, _, config = name[4:].partition(_OF)
        given = class_of_transformers(config, PreTrainedConfig) if config else None
        return slim_model_class(class_of_transformers(base, PreTrainedModel), given)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def base_of(model: Any) -> tuple[Any, Any]:
    """Return the class that a model derives from, or is of, and the config to build it with.

    Args:
        model: slim or not; its config is copied. Of a model that keeps some layers of an original,
            the config is the original's.
    """
    base: Any = next(
        cls
        for cls in type(model).__mro__
        if issubclass(cls, PreTrainedModel) and not issubclass(cls, SlimModelMixin)
    )
    if not isinstance(model, SlimModelMixin):
        return base, copy.deepcopy(model.config)
    slim: Any = model.config  # type: ignore[attr-defined]
    fields = {key: value for key, value in slim.to_dict().items() if key not in _SLIM_FIELDS}
    config = plain_class(slim).__bases__[0].from_dict(fields)
    if depth := slim.llmslim.get("depth"):
        restore_original(config, depth)
    return base, config


def replace_sites(model: nn.Module, sites: dict[str, dict[str, Any]]) -> None:
    """Swap every site for an empty block, in place, on the device and in the type it had.

    Args:
        model: the base model; still dense.
        sites: module or parameter name to block spec.

    Raises:
        ValueError: if the model has nothing of that name.
    """
    shared = other_names(model, set(sites))
    for name, spec in sites.items():
        try:
            weight = site_weight(model, name)
        except AttributeError as error:
            raise ValueError(f"config.json: no module {name!r} to replace in the model") from error
        block = build(spec, device=weight.device, dtype=weight.dtype)
        place_buffers(block)
        for each in (name, *shared.get(name, ())):
            set_module(model, each, block)
            _mark_parents(model, each)
    keep_apart(model, sites)
    refresh_ties(model)


def _mark_parents(model: nn.Module, name: str) -> None:
    """Mark the modules around a block as initialised, in place.

    Loading calls the base class's `_init_weights` on every module that has no parameters of its
    own; some look for the dense weights of their projections there, though only to leave loaded
    ones alone. Modules with buffers stay: they may be computed nowhere else.
    """
    parts = name.split(".")
    for depth in range(1, len(parts)):
        around: Any = model.get_submodule(".".join(parts[:depth]))
        if not isinstance(around, PreTrainedModel) and not any(True for _ in around.buffers(False)):
            mark_initialized(around)


_COLUMNS = ("colwise", "packed_colwise", "colwise_gather_output", "colwise_rep")
"""Styles of projections of which each device computes a share of the outputs."""
_ROWS = ("rowwise", "rowwise_split_input", "rowwise_rep")
"""Styles of projections of which each device multiplies a share of the inputs."""
_OPEN = ("colwise", "packed_colwise", "rowwise")
"""Those of them that leave activations sharded, or want them so."""
_CLOSED = (*_COLUMNS, *_ROWS, "embedding_rowwise", "embedding_colwise")
"""All others of these take whole activations and return whole ones."""
_CLOSED_AROUND = ("moe_tp_experts", "all_reduce", "ep_dispatch_experts")
"""Styles of modules that do so, whatever is inside."""
_NOT_SHARDED = ("mla_kv_a_proj",)
"""Styles that shard no weights: they do for a block as for a projection."""


def sharded_plan(
    model: nn.Module, plan: dict[str, str], devices: int, *, with_bias: bool = True
) -> tuple[dict[str, str], set[str]]:
    """Return a parallel plan for a model with blocks, and which modules every device holds whole.

    Where a block has an `nn.Linear` of its own at the side that is to be sharded, that one is:
    both of `low_rank`, between which activations are whole. Where it has none, or `devices` do not
    divide a width into whole heads, whatever exchanges sharded activations with the block is whole,
    too: the MLP, the attention.

    Args:
        model: with empty weights.
        plan: the styles of the dense model's modules and parameters, each by its full name.
        devices: how many share a layer.
        with_bias: whether the bias of a block can be sharded beside its `nn.Linear`.
    """
    made, whole = dict(plan), set()
    for name, module in model.named_modules():
        style = plan.get(name, "")
        is_block = hasattr(module, "spec") and style not in _NOT_SHARDED
        if not style or not (is_block or isinstance(module, nn.Linear)):
            continue
        side = "output_linear" if style in _COLUMNS else "input_linear" if style in _ROWS else ""
        linear = getattr(module, side, "") if is_block else name
        has_bias = is_block and getattr(module, "bias", None) is not None
        shards_bias = has_bias and style in _OPEN and style in _COLUMNS
        can = linear and (with_bias or not shards_bias)
        if not can or not _divides(devices, model, name, style):
            whole.add(_closed_around(name, plan))
        elif is_block:
            del made[name]
            made.pop(f"{name}.bias", None)
            made |= {f"{name}.{linear}.weight": style, f"{name}.{linear}": style}
            made |= {f"{name}.bias": style, name: "local_params"} if shards_bias else {}
    inside = re.compile("|".join(rf"{re.escape(each)}(\..+)?" for each in whole) or "(?!)")
    return {name: style for name, style in made.items() if not inside.fullmatch(name)}, whole


def _divides(devices: int, model: nn.Module, name: str, style: str) -> bool:
    """Return whether a sharded side of a projection or block has equal shares, of whole heads."""
    if style not in _OPEN:
        return True
    module: Any = model.get_submodule(name)
    size = module.in_features if style in _ROWS else module.out_features
    # How transformers shards a dense attention is not for this to change.
    holder = None if isinstance(module, nn.Linear) else model.get_submodule(name.rpartition(".")[0])
    unit = (getattr(holder, "head_dim", None) or 1) * (2 if style == "packed_colwise" else 1)
    return bool(size % (devices * unit) == 0)


def _closed_around(name: str, plan: dict[str, str]) -> str:
    """Return the smallest module around a block that takes and returns whole activations."""
    if plan[name] in _CLOSED and plan[name] not in _OPEN:
        return name
    parts = name.split(".")
    layer = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 3)
    # A child of the layer: an attention may have modules of its own around its projections.
    child = max(min(layer + 2, len(parts) - 1), 1)
    lengths = range(max(len(parts) - 1, child), child - 1, -1)
    around = [".".join(parts[:length]) for length in lengths]
    return next((each for each in around if plan.get(each) in _CLOSED_AROUND), around[-1])


class _Whole(nn.Module):
    """A dense projection that vLLM does not take for one, and so neither joins nor shards."""

    forward = nn.Linear.forward


def shard_in_vllm(model: Any, devices: int) -> None:
    """Give a model the plan by which vLLM shards it, in place.

    Args:
        model: with blocks, as vLLM builds it.
        devices: how many share a layer.

    Raises:
        ValueError: if an attention has to be whole: vLLM gives each device some of its heads.
    """
    names = [name for name, _ in model.named_modules()]
    styles = {name: model.tp_plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name)) for name in names}
    plan = {name: style for name, style in styles.items() if style}
    model.tp_plan, whole = sharded_plan(model, plan, devices, with_bias=False)
    for name in sorted(whole):
        modules = list(model.get_submodule(name).modules())
        if any(isinstance(getattr(module, "layer_idx", None), int) for module in modules):
            raise ValueError(
                f"{name}: vLLM gives each of {devices} devices whole heads of an attention, and "
                "its blocks cannot be sharded so: low_rank without biases can. Use one device for "
                "each layer, or `llmslim export --dense`."
            )
        for module in modules:
            if type(module) is nn.Linear:
                module.__class__ = _Whole  # type: ignore[assignment]


def site_weight(model: nn.Module, name: str) -> nn.Parameter:
    """Return a site's weight: of a module, or the parameter of that name (a stack of experts).

    Raises:
        AttributeError: if the model has nothing of that name.
    """
    parent, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(parent), leaf)
    return found if isinstance(found, nn.Parameter) else next(found.parameters())


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of a module, or of a parameter, of that name, in place."""
    parent, _, leaf = name.rpartition(".")
    holder = model.get_submodule(parent)
    if isinstance(getattr(holder, leaf, None), nn.Parameter):
        delattr(holder, leaf)
    setattr(holder, leaf, module)
    if adapt := getattr(module, "adapt", None):
        adapt(holder)


def other_names(model: nn.Module, names: set[str]) -> dict[str, list[str]]:
    """Return under which further names modules are found: shared ones, and tied copies.

    Args:
        model: the model.
        names: of the modules to look for.

    Returns:
        Other names by name, only of modules that have some. A tied copy is another module of the
        same class that has the same weight.
    """
    # transformers ties weights after a model is built on the meta device; until then only its list
    # tells which will be one.
    tied = getattr(model, "all_tied_weights_keys", {})
    owners: dict[tuple[Any, type], str] = {}
    found: dict[str, list[str]] = {}
    modules = []
    for name, module in model.named_modules(remove_duplicate=False):
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        root = tied.get(f"{name}.weight", f"{name}.weight")
        marks = (id(module if weight is None else weight), type(module)), (root, type(module))
        modules.append((name, marks))
        if name in names:
            for mark in marks:
                owners.setdefault(mark, name)
    for name, marks in modules:
        owner = next((owners[mark] for mark in marks if mark in owners), name)
        if owner != name and name not in names:
            found.setdefault(owner, []).append(name)
    return found


def refresh_ties(model: Any) -> None:
    """Bring transformers' list of tied weights up to date with the names there are, in place."""
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def become_slim(
    model: Any, sites: dict[str, dict[str, Any]], depth: dict[str, Any] | None = None
) -> None:
    """Turn a model whose sites were replaced into a slim model, in place: class and config.

    Args:
        model: a language model with blocks at `sites`.
        sites: module name to block spec, of all its blocks.
        depth: the record of the layers it keeps of an original, see `depth`.
    """
    base_config, base_model = plain_class(model.config), type(model)
    if not issubclass(base_model, SlimModelMixin):
        model.config.__class__ = slim_config_class(base_config)
        model.__class__ = slim_model_class(base_model, base_config)
    model.config.base_model_type = type(model.config).base_model_type
    model.config.llmslim = {"format": FORMAT, "sites": sites}
    if plugins := {name: home for name in structure_names(sites) if (home := plugin_of(name))}:
        model.config.llmslim["plugins"] = plugins
    if depth:
        model.config.llmslim["depth"] = depth
    base, config = base_of(model)
    model.config.auto_map = auto_map(base, type(config))
    model.config.architectures = [type(model).__name__]
    refresh_ties(model)


__all__ = ["SlimModelMixin", "become_slim", "replace_sites"]
