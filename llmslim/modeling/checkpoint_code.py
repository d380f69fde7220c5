"""The files of code beside a checkpoint's weights, so that it loads where llmslim is not installed.

They are this package's own modeling files, as they are, and one that is written for the checkpoint,
the entry file: it spells out the classes that config.json's `auto_map` names, so that they can be
imported, pickled and found by other processes, and imports the structures used, since transformers
copies only what it sees imported.

These files travel inside checkpoints: they import torch and transformers only.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import transformers

from .base_class import model_classes
from .configuration_llmslim import MODEL_TYPE
from .structured import PLAIN, structure_class

ENTRY_FILE = "llmslim_entry.py"
"""Generated beside the weights; imports the structures used, so that transformers copies them."""
OLDEST = (5, 19)
"""The first transformers that this works with, as the package's own requirement says."""


def auto_map(base: Any, config: Any) -> dict[str, str]:
    """Return the `auto_map` of a slim config.json: the classes of its entry file.

    Args:
        base: the class that the model derives from; what other Auto classes find for its config
            can be loaded from the same files.
        config: class of its config.
    """
    named = {"AutoConfig": f"Slim{config.__name__}"}
    for auto, classes in _classes_beside(base, config).items():
        named[auto] = f"Slim{(base if base in classes else classes[0]).__name__}"
    return {auto: f"{Path(ENTRY_FILE).stem}.{name}" for auto, name in named.items()}


def _classes_beside(base: Any, config: Any) -> dict[str, tuple[Any, ...]]:
    # The text part of a config that is listed is listed nowhere itself (Emu3, Mllama).
    return dict(model_classes(config)) or {"AutoModelForCausalLM": (base,)}


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


def write_code(folder: Path, structures: set[str], base: Any, config: Any) -> list[Path]:
    """Copy the files a checkpoint needs to load where llmslim is not installed.

    Args:
        folder: the checkpoint.
        base: the class that the model derives from.
        structures: names of the structures in it. That of a plug-in is copied where its file
            imports nothing but torch, transformers, the standard library and llmslim.modeling.
        config: class of the model's config.

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
    entry = entry_code(base, config, sorted(texts))
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


def entry_code(base: Any, config: Any, structures: Iterable[str]) -> str:
    """Return the entry file: the classes of one checkpoint, by names that can be imported.

    Args:
        base: the class that its model derives from.
        config: class of its config.
        structures: files of the structures it uses.
    """
    beside = _classes_beside(base, config)
    classes = list(dict.fromkeys((base, *(cls for each in beside.values() for cls in each))))
    slim_config, oldest = f"Slim{config.__name__}", ".".join(map(str, OLDEST))
    lines = [
        f'"""Entry point of this checkpoint: {base.__name__} with slim blocks."""\n',
        "import transformers\n",
        f"if tuple(map(int, transformers.__version__.split('.')[:2])) < {OLDEST}:",
        f'    needed = "this model needs transformers {oldest} or newer; installed is "',
        "    raise ImportError(needed + transformers.__version__)\n",
        *(f"from transformers import {name}" for name in beside),
        *(f"from {_home(cls)} import {cls.__name__}" for cls in (config, *classes)),
        "",
        *(f"from .{name} import *  # noqa: F403" for name in structures),
        "from .modeling_llmslim import SlimModelMixin\n\n",
        f"class {slim_config}({config.__name__}):",
        f'    model_type = "{MODEL_TYPE}"',
        f'    base_model_type = "{config.model_type}"\n',
    ]
    for cls in classes:
        lines += [
            f"\nclass Slim{cls.__name__}(SlimModelMixin, {cls.__name__}):",
            f"    config_class = {slim_config}\n",
        ]
    lines.append("\n# What builds a part of a model by its config finds these; nothing else does.")
    for auto, found in beside.items():
        names = ", ".join(f"Slim{cls.__name__}" for cls in found)
        lines.append(f"{auto}.register({slim_config}, ({names},), exist_ok=True)")
    return "\n".join(lines) + "\n"


def _home(cls: type) -> str:
    """Return where a class is imported from, wherever transformers keeps it."""
    return "transformers" if getattr(transformers, cls.__name__, None) is cls else cls.__module__


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
