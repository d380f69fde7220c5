"""The models that an evaluation or a benchmark is about: found, loaded, and on their device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from transformers import PreTrainedModel

from llmslim._version import __version__
from llmslim.anatomy.device import device_named
from llmslim.storage import MANIFEST, load_model, load_tokenizer, open_source


class Placement(Protocol):
    """Where models run, and in which type."""

    @property
    def device(self) -> str | None:
        """Name of the device; a GPU if any, where it is None."""

    @property
    def dtype(self) -> str | None:
        """Type of the weights; as stored, where it is None."""

    @property
    def trust_remote_code(self) -> bool:
        """Whether to run the modeling code that comes with a model."""


def opened(model: Any, options: Placement) -> tuple[Any, str, Any]:
    """Return a model on the device, its name and its tokenizer, None where it has none."""
    device = device_named(options.device)
    trusted = options.trust_remote_code
    if isinstance(model, PreTrainedModel):
        where = model.config.name_or_path
        tokenizer = load_tokenizer(open_source(where)) if where else None
        return model.to(device), where or type(model).__name__, tokenizer  # type: ignore[arg-type]
    source = open_source(model, trust_remote_code=trusted)
    loaded: Any = load_model(source, dtype=options.dtype, trust_remote_code=trusted)
    return loaded.to(device), source.name, load_tokenizer(source, trust_remote_code=trusted)


def folder_of(model: PreTrainedModel | str | Path) -> Path | None:
    """Return the folder where results are kept: that of a checkpoint which llmslim wrote."""
    if isinstance(model, PreTrainedModel):
        return None
    path = Path(model).expanduser()
    return path if (path / MANIFEST).is_file() else None


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that figures depend on."""
    known = {"llmslim": __version__, "torch": torch.__version__}
    return {**known, "transformers": transformers.__version__}
