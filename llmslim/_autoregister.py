"""Teach transformers, peft and vLLM the model type `llmslim`, without importing any of them early.

`import llmslim` must stay cheap (no torch), yet afterwards
`AutoModelForCausalLM.from_pretrained(slim_checkpoint)` must know the type, a `LoraConfig` without
targets what it means for one, and vLLM that its Transformers backend runs it. So this waits for
their tables to be imported and adds lines right then. vLLM imports llmslim by itself, for each of
its processes: by the entry point `vllm.general_plugins` of pyproject.toml.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def _register() -> None:
    # The module registers itself; if it is the one that is just importing the registry, it will.
    importlib.import_module("llmslim.modeling.configuration_llmslim")


def _name_targets() -> None:
    table = sys.modules[_TARGETS].TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    table.setdefault("llmslim", "all-linear")


def _name_architectures() -> None:
    names = importlib.import_module("transformers.models.auto.modeling_auto")
    registry = sys.modules[_ARCHITECTURES].ModelRegistry
    for name in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        registry.register_model(f"Slim{name}", f"{_BACKEND}:TransformersForCausalLM")


_TARGETS = "peft.utils.constants"
_ARCHITECTURES = "vllm.model_executor.models.registry"
_BACKEND = "vllm.model_executor.models.transformers"
_TABLES = {
    "transformers.models.auto.configuration_auto": _register,
    _TARGETS: _name_targets,
    _ARCHITECTURES: _name_architectures,
}
"""Modules that know other libraries' types, and what to do once each is imported."""


class _AfterExec(importlib.abc.Loader):
    """Runs a module as its own loader would, then does something."""

    def __init__(self, loader: importlib.abc.Loader, then: Callable[[], None]) -> None:
        self._loader, self._then = loader, then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._then()


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps the loaders of some modules when they are first imported."""

    def __init__(self, waiting: dict[str, Callable[[], None]]) -> None:
        self._waiting = waiting

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None,  # noqa: ARG002  (the protocol's)
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        then = self._waiting.pop(name, None)
        if then is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _AfterExec(spec.loader, then)
        return spec


def register_when_imported() -> None:
    """Register now where a table is imported already, else when it is."""
    for name, then in _TABLES.items():
        if name in sys.modules:
            then()
    waiting = {name: then for name, then in _TABLES.items() if name not in sys.modules}
    if waiting:
        sys.meta_path.insert(0, _Finder(waiting))
