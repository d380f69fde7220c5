"""What every structured projection has in common, and how one is found by name.

A structure is a drop-in for `nn.Linear` whose matrix is cheaper than dense. Each lives in a file
of its own beside this one; the file's name is the structure's name in recipes and checkpoints,
so a new structure is one new file and nothing else.

Shapes: I = in_features, O = out_features.
"""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class StructuredLinear(nn.Module, ABC):
    """A projection x (..., I) -> y (..., O) held in fewer parameters than its dense matrix.

    Args:
        in_features: input channels I.
        out_features: output channels O.
        bias: whether a bias of shape (O,) is added, as in `nn.Linear`.
        device: where the parameters live.
        dtype: the parameters' type.
    """

    name: ClassVar[str]
    """The structure's name; also the name of its file."""
    option_names: ClassVar[tuple[str, ...]]
    """Options that a recipe may give; `resolve` turns them into constructor arguments."""
    buffer_names: ClassVar[tuple[str, ...]] = ()
    """Persistent integer buffers (fitted, never trained)."""
    parts: ClassVar[tuple[str, ...]] = ()
    """Other structures that this one is made of; their files travel with it."""

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @classmethod
    @abstractmethod
    def resolve(cls, in_features: int, out_features: int, **options: Any) -> dict[str, Any]:
        """Turn a recipe's options into explicit constructor arguments, from integers alone.

        Raises:
            StaysDense: if these sizes leave nothing to gain; the message is the reason.
            ValueError: if the options are wrong for these sizes.
        """

    @classmethod
    @abstractmethod
    def count_weights(cls, in_features: int, out_features: int, **resolved: Any) -> int:
        """Return the number of weights, bias not counted, from integers alone."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Return this block's resolved options, ready for JSON and for the constructor."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw new weights, in place, with the output variance of a fresh `nn.Linear`."""

    def reset_buffers(self) -> None:
        """Set index buffers to the order of the channels, in place; most blocks have none."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Return x times the block's matrix, x (..., I) -> (..., O), bias not added."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., I) to (..., O)."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """Return the equivalent `nn.Linear` weight, shape (O, I), in the parameters' type."""
        weight = next(self.parameters())
        identity = torch.eye(self.in_features, device=weight.device, dtype=weight.dtype)
        return self.product(identity).t().contiguous()

    def spec(self) -> dict[str, Any]:
        """Return what `build` needs to make an empty block like this one; JSON values only."""
        return {
            "structure": self.name,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            **self.options(),
        }

    def extra_repr(self) -> str:
        """Show the spec the way `nn.Linear` shows its sizes."""
        return ", ".join(f"{k}={v}" for k, v in self.spec().items() if k != "structure")


def structure_class(name: str) -> type[nn.Module]:
    """Return the class behind a structure's name.

    Raises:
        ValueError: if no structure has that name.
        ModuleNotFoundError: if the structure's own imports fail.
    """
    # The name comes from recipes and checkpoints: only a plain word may reach the importer.
    if re.fullmatch(r"[a-z][a-z0-9_]*", name):
        try:
            module = importlib.import_module(f".{name}", __package__)
        except ModuleNotFoundError as error:
            if error.name != f"{__package__}.{name}":
                raise
        else:
            for value in vars(module).values():
                if isinstance(value, type) and value.__dict__.get("name") == name:
                    return value
    raise ValueError(f"structure {name!r} is not known")


def build(
    spec: dict[str, Any],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return an empty block as described by a checkpoint's site entry.

    Args:
        spec: `structure`, its sizes and its resolved options, as `StructuredLinear.spec` gives.
        device: where the parameters live.
        dtype: the parameters' type.

    Raises:
        ValueError: if the structure is not known or its options do not fit.
    """
    options = dict(spec)
    cls = structure_class(str(options.pop("structure", "")))
    try:
        return cls(**options, device=device, dtype=dtype)
    except TypeError as error:
        raise ValueError(f"structure {spec['structure']!r}: {error}") from error
