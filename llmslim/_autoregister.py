"""Teach transformers the model type `llmslim` once both are imported, without importing it early.

`import llmslim` must stay cheap (no torch), yet afterwards
`AutoModelForCausalLM.from_pretrained(slim_checkpoint)` must know the type. transformers has no
plug-in point, so this waits for its config registry to be imported and registers right then.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_REGISTRY = "transformers.models.auto.configuration_auto"


def _register() -> None:
    # The module registers itself; if it is the one that is just importing the registry, it will.
    importlib.import_module("llmslim.modeling.configuration_llmslim")


class _AfterExec(importlib.abc.Loader):
    """Runs a module as its own loader would, then registers."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps the loader of one module, the first time it is asked for."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None,  # noqa: ARG002  (the protocol's)
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _AfterExec(spec.loader)
        return spec


def register_when_imported() -> None:
    """Register now if transformers' config registry is imported already, else when it is."""
    if _REGISTRY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())
