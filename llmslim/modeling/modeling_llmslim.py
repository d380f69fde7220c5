"""Load a slimmed checkpoint as a subclass of the model it was made from.

A slim checkpoint's config.json holds every field of its base config plus

    model_type: llmslim        so that no reader takes it for the dense base model
    base_model_type: llama     which transformers classes to build on
    llmslim: {format: 1, sites: {module name: spec}}

and, with structures of other packages, `plugins: {structure: module that it is from}`. Nothing is
ever imported by the names in there.

`SlimConfig` and `SlimForCausalLM` are factories for transformers' Auto classes, never instances:
from config.json they derive a config class from the base config class and a model class from the
base model class whose `__init__` swaps each site for the block that its spec describes. What
comes back is a LlamaForCausalLM, Phi3ForCausalLM ... to generate, peft, Trainer and accelerate.

The original model_type would load too, as a dense model with random weights where the blocks
were: hence the new type, and a load that fails on any missing or left-over weight.

These files travel inside checkpoints: they import torch and transformers only.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .base_class import auto_classes, base_class_of
from .compat import BuiltByAuto, build_from_config, mark_initialized
from .configuration_llmslim import FORMAT, SlimConfig, slim_config_class
from .depth import build_kept, plain_class, restore_original
from .structured import PLAIN, build, structure_class

ENTRY_FILE = "llmslim_entry.py"
"""Generated beside the weights; imports the structures used, so that transformers copies them."""


_SLIM_FIELDS = ("llmslim", "base_model_type", "auto_map", "model_type", "architectures")
"""Fields of a slim config that its base config does not have, or has otherwise."""


class SlimModelMixin:
    """What a slim model does on top of its base class: build its blocks, refuse half a load."""

    all_tied_weights_keys: dict[str, str]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_plugins(config.llmslim.get("plugins", {}))
        depth = config.llmslim.get("depth")
        if depth:  # see `depth`: the original is built, and layers are taken out of it
            restore_original(config, depth)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if depth:
            build_kept(self, depth)
        replace_sites(self, config.llmslim["sites"])  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as the base class does, but fail where weights are missing or left over.

        Raises:
            ValueError: if the files do not hold exactly this model's weights.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, **kwargs, output_loading_info=True)  # type: ignore[misc]
        problems = [
            f"{what}: {', '.join(map(str, sorted(info[key])[:5]))}"
            f"{f' and {len(info[key]) - 5} more' if len(info[key]) > 5 else ''}"
            for key, what in (
                ("missing_keys", "missing weights"),
                ("unexpected_keys", "left-over weights"),
                ("mismatched_keys", "weights of another shape"),
            )
            if info.get(key)
        ]
        if problems:
            raise ValueError(f"{args[0]}: not a whole slim checkpoint; {'; '.join(problems)}")
        return (model, info) if wants_info else model

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return whether the base class is custom code; transformers treats a slim class alike.

        Otherwise loading would not recompute the tables that some models keep out of their files.
        """
        base: Any = next(base for base in cls.__mro__ if not issubclass(base, SlimModelMixin))
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

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as the base class does, and the files that load it again beside the weights."""
        self.config.auto_map = auto_map(self.config)  # type: ignore[attr-defined]
        # Names are the module's own: model_type llmslim has no conversion to undo on loading.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            sites = self.config.llmslim["sites"]  # type: ignore[attr-defined]
            write_code(Path(save_directory), set(structure_names(sites)))


_classes: dict[type, Any] = {}


def slim_model_class(base: Any) -> Any:
    """Return the slim subclass of a model class."""
    if base not in _classes:
        _classes[base] = type(
            f"Slim{base.__name__}",
            (SlimModelMixin, base),
            {
                "__module__": __name__,
                "__doc__": f"{base.__name__} with slim blocks.",
                "config_class": slim_config_class(base.config_class),
            },
        )
    return _classes[base]


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


class SlimForCausalLM(BuiltByAuto):
    """Factory for slim models, as AutoModelForCausalLM and the other Auto classes use it.

    It has no `config_class`: the Auto classes compare that by name, and there is one per base.
    """

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load a slim checkpoint."""
        if config is None:
            config = SlimConfig.from_pretrained(path)
        model_class = slim_model_class(base_class_of(config))
        return model_class.from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """Build a slim model that its config describes."""
        return build_from_config(slim_model_class(base_class_of(config)), config, **kwargs)


def auto_map(config: Any) -> dict[str, str]:
    """Return the `auto_map` of a slim config.json: the files that load it.

    Args:
        config: a slim config; it loads with the Auto classes that its base loads with.
    """
    known = auto_classes(plain_class(config).__bases__[0]) or ("AutoModelForCausalLM",)
    models = dict.fromkeys(known, "llmslim_entry.SlimForCausalLM")
    return {"AutoConfig": "llmslim_entry.SlimConfig", **models}


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
        for each in (name, *shared.get(name, ())):
            set_module(model, each, block)
            _mark_parents(model, each)
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
        model.__class__ = slim_model_class(base_model)
    model.config.base_model_type = type(model.config).base_model_type
    model.config.llmslim = {"format": FORMAT, "sites": sites}
    if plugins := {name: home for name in structure_names(sites) if (home := plugin_of(name))}:
        model.config.llmslim["plugins"] = plugins
    if depth:
        model.config.llmslim["depth"] = depth
    model.config.auto_map = auto_map(model.config)
    model.config.architectures = [type(model).__name__]
    refresh_ties(model)


def structure_names(specs: dict[str, Any]) -> Iterator[str]:
    """Yield the name of every structure in `specs` that has a class, those inside others too."""
    for key, value in specs.items():
        if isinstance(value, dict):
            yield from structure_names(value)
        elif key == "structure" and value not in PLAIN:
            yield value


def plugin_of(structure: str) -> str:
    """Return the module that a structure of another package is from, empty where it is ours."""
    module = structure_class(structure).__module__
    return "" if module.rpartition(".")[0] == __name__.rpartition(".")[0] else module


def check_plugins(plugins: dict[str, str]) -> None:
    """Compare the packages that a model's structures were from with what is installed.

    Raises:
        ValueError: if one is not there, or another package gives the structure of its name.
    """
    for structure, module in plugins.items():
        package = module.partition(".")[0]
        try:
            home = plugin_of(structure)
        except ValueError as error:
            raise ValueError(
                f"config.json: structure {structure!r} is from the package {package!r}, which is "
                "not installed here, or has not registered it. Install or import it first"
            ) from error
        # A class of a notebook or script is of no package, whether now or when it was saved.
        if home and home.partition(".")[0] != package and "__main__" not in (home, package):
            raise ValueError(
                f"config.json: structure {structure!r} is from the package {package!r}; here "
                f"{home!r} gives one of that name. Install {package!r} in its place"
            )


def write_code(folder: Path, structures: set[str]) -> list[Path]:
    """Copy the files a checkpoint needs to load where llmslim is not installed.

    Args:
        folder: the checkpoint.
        structures: names of the structures in it. That of a plug-in is copied where its file
            imports nothing but torch, transformers, the standard library and llmslim.modeling.

    Returns:
        The files written: this package's own, verbatim, and one generated entry file that
        imports them, since transformers copies only what it sees imported.
    """
    here = Path(__file__).parent
    texts: dict[str, str] = {}
    for structure in structures:
        module: Any = sys.modules[structure_class(structure).__module__]
        if not plugin_of(structure):
            file = Path(module.__file__)
            texts[file.stem] = file.read_text(encoding="utf-8")
        elif text := standing_alone(module):
            texts[structure] = text
    imports = "".join(f"from .{name} import *  # noqa: F403\n" for name in sorted(texts))
    entry = (
        '"""Entry point of this checkpoint: the model classes and the structures it uses."""\n\n'
        f"{imports}from .configuration_llmslim import SlimConfig  # noqa: F401\n"
        "from .modeling_llmslim import SlimForCausalLM  # noqa: F401\n"
    )
    todo = [entry, *texts.values()]
    while todo:
        for name in re.findall(r"(?m)^\s*from \.(\w+) import", todo.pop()):
            if name not in texts:
                texts[name] = (here / f"{name}.py").read_text(encoding="utf-8")
                todo.append(texts[name])
    texts[Path(ENTRY_FILE).stem] = entry
    written = [folder / f"{name}.py" for name in sorted(texts)]
    for path in written:
        path.write_text(texts[path.stem], encoding="utf-8", newline="\n")
    return written


_OURS = re.compile(r"(?m)^(\s*)from llmslim\.modeling\.(\w+) import")


def standing_alone(module: Any) -> str | None:
    """Return a plug-in's file as it can stand in a checkpoint; None where it needs its package.

    Args:
        module: of another package.
    """
    try:
        text = inspect.getsource(module)
    except (OSError, TypeError):  # not from a file
        return None
    allowed = sys.stdlib_module_names | {"torch", "transformers"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        else:
            continue
        for name in names:
            ours = isinstance(node, ast.ImportFrom) and name.startswith("llmslim.modeling.")
            if name.partition(".")[0] not in allowed and not ours:
                return None
    return _OURS.sub(r"\1from .\2 import", text)


__all__ = ["SlimForCausalLM", "become_slim", "replace_sites"]
