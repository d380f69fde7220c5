"""What a result depends on, to be known again when work that was cut short goes on.

A key says it part by part: a name, and what it was. Contents go by their SHA-256; their names begin
with `the`, so that a message says that they have changed and not from which digest to which.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmslim._version import __version__

_SHOWN = 5
_PIECE = 1 << 24  # numbers that are hashed at once
_PASSING = ("_name_or_path", "transformers_version", "_commit_hash")  # where a config is from


def versions(*libraries: Any) -> dict[str, str]:
    """Return the versions of llmslim and of what it computes with, as parts of a key."""
    known = {"llmslim": __version__, **{one.__name__: one.__version__ for one in libraries}}
    return {f"version of {name}": str(version) for name, version in known.items()}


def add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Add a tensor's name, type, shape and bytes to a digest of hashlib."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    for piece in tensor.detach().reshape(-1).split(_PIECE):
        digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())


def model_digest(model: Any) -> str:
    """Return the SHA-256 of a model's class, config and weights.

    Args:
        model: in memory, on any device.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    config = {k: v for k, v in model.config.to_dict().items() if k not in _PASSING}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        add_tensor(digest, name, tensor)
    return digest.hexdigest()


def what_changed(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in which parts two keys differ, the first few of them; empty where in none.

    Args:
        begun: of the work that was cut short.
        now: of what is asked for.

    Example:
        >>> what_changed({"the model": "a1", "seed": 1, "tau": 2}, {"the model": "b2", "seed": 3})
        'the model has changed; seed was 1 and is 3; tau was 2 and is None'
    """
    names = sorted(
        (name for name in {*begun, *now} if begun.get(name) != now.get(name)),
        key=lambda name: (not name.startswith("the "), name),
    )
    said = "; ".join(_difference(name, begun, now) for name in names[:_SHOWN])
    return said + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _difference(name: str, begun: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if name.startswith("the "):
        return f"{_shown(name)} has changed"
    return f"{_shown(name)} was {_shown(begun.get(name))} and is {_shown(now.get(name))}"


def _shown(value: Any) -> str:
    """Return a value in a few words; it may be from a file that somebody else wrote."""
    text = str(value)[:80]
    return text if text.isprintable() else repr(text)
