"""What every structured projection has in common, and how one is found by name.

A structure is a drop-in for `nn.Linear` whose matrix is cheaper than dense: a subclass of
`StructuredLinear` in its own file, beside this one or in another package (docs/plugins.md).
It has a `name`, its `Options`, and methods that make, draw and multiply with its parameters.

A structure that writes its product as `product_by(x, by)`, in terms of `Products` with weights that
it names, also serves the experts of a mixture, whose rows meet weights of their own (`experts.py`).
`Own` takes the weights of the block at hand.

Shapes: I = in_features, O = out_features, N = rows, G = groups, K = channels in, C = channels
chosen from.
"""

from __future__ import annotations

import importlib
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import MISSING, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from transformers import Conv1D

from .compat import mark_initialized
from .sizes import OptionError, StaysDense


class Products(Protocol):
    """Products with the weights of a block, by their names in it."""

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Return x (N, K) times an `nn.Linear`, (N, O)."""

    def bmm(self, x_GNK: Tensor, name: str) -> Tensor:
        """Return each of G matrices times its own, a parameter (G, K, O), as (G, N, O)."""

    def take(self, x_NC: Tensor, name: str) -> Tensor:
        """Return the channels that an index buffer of any shape names, one after the other."""

    def of(self, name: str) -> Products:
        """Return the products with the weights of a block inside this one."""


class StructuredLinear(nn.Module, ABC):
    """A projection x (..., I) -> y (..., O) held in fewer parameters than its dense matrix.

    Args:
        in_features: input channels I.
        out_features: output channels O.
        bias: whether a bias of shape (O,) is added, as in `nn.Linear`.
        device: where the parameters live.
        dtype: the parameters' type.
        options: the structure's own, as a recipe gives them.

    Raises:
        OptionError: if an option is not known, missing, or wrong for these sizes.
    """

    name: ClassVar[str]
    """The structure's name in recipes and checkpoints."""
    Options: ClassVar[Any]
    """A frozen dataclass: what recipes may say, each option as `Annotated[type, "help"]`. What
    differs from the defaults is stored in checkpoints."""
    buffer_names: ClassVar[tuple[str, ...]] = ()
    """Persistent integer buffers (fitted, never trained)."""
    input_linear: ClassVar[str] = ""
    """The `nn.Linear` that alone meets the input, if the block has one; then tensor parallelism
    can shard the block over its inputs."""
    output_linear: ClassVar[str] = ""
    """The `nn.Linear` whose outputs are the block's, in their order: over its outputs likewise."""

    options: Any
    """This block's `Options`, resolved."""
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        given = self.read_options(options)
        try:
            self.options = self.resolve(in_features, out_features, given)
        except StaysDense:  # no gain, but still a block
            self.options = given
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.create(device=device, dtype=dtype)
        if not next(self.parameters()).is_meta:  # where numbers are drawn for nothing, and slowly
            self.reset_parameters()

    @classmethod
    def read_options(cls, given: dict[str, Any]) -> Any:
        """Return the `Options` of these names and values.

        Raises:
            OptionError: if one is not known or missing, or is of another type.
        """
        hints = _option_types(cls)
        for field in fields(cls.Options):
            if field.name not in given and field.default is MISSING:
                raise OptionError(field.name, f"{cls.name} needs the option {field.name}")
        for name, value in given.items():
            if name not in hints:
                allowed = f"allowed {', '.join(hints)}" if hints else "it takes none"
                raise OptionError(name, f"{name} is not an option of {cls.name}; {allowed}")
            if not _is_of(value, hints[name]):
                raise OptionError(name, f"{name} {value!r}; allowed {_in_words(hints[name])}")
        return cls.Options(**given)

    @classmethod
    def resolve(cls, in_features: int, out_features: int, options: Any) -> Any:
        """Return explicit `Options` for these sizes, from integers alone; here they stay.

        Args:
            in_features: input channels I.
            out_features: output channels O.
            options: as a recipe gives them, or explicit ones already.

        Raises:
            StaysDense: if these sizes leave nothing to gain; the message is the reason.
            OptionError: if the options are wrong for these sizes.
        """
        del in_features, out_features
        return options

    @classmethod
    def is_linear(cls, options: Any) -> bool:
        """Return whether some matrix equals a block with these options: only such are fitted."""
        del options
        return True

    @classmethod
    def for_auto(cls, in_features: int, out_features: int, keep_ratio: float) -> Any:
        """Return the options under which `structure: auto` tries it in one size, None for not.

        Args:
            in_features: input channels I.
            out_features: output channels O.
            keep_ratio: share of the dense weights to keep, at most.

        Returns:
            A dictionary, as a recipe would give them.
        """
        del in_features, out_features, keep_ratio

    @classmethod
    def count_weights(cls, in_features: int, out_features: int, options: Any) -> int:
        """Return the number of weights of a block, bias not counted; one is built without memory.

        Raises:
            ValueError: if no such block can be built.
        """
        block = cls(in_features, out_features, device="meta", **option_values(options))
        return sum(parameter.numel() for parameter in block.parameters())

    @abstractmethod
    def create(self, **kind: Any) -> None:
        """Make the parameters and buffers, empty; called once `options` are there.

        Args:
            kind: `device` and `dtype`, as `torch.empty` takes them.

        Raises:
            OptionError: if the options are wrong for the sizes.
        """

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw new weights, in place, with the output variance of a fresh `nn.Linear`."""

    def reset_buffers(self) -> None:
        """Set index buffers to the order of the channels, in place; most blocks have none."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Return x times the block's matrix, x (..., I) -> (..., O), bias not added."""

    def product_by(self, x_NI: Tensor, by: Products) -> Tensor:
        """Return the block's product with weights that `by` knows by their names, (N, O).

        A structure that has this multiplies the rows of all experts of a mixture at once.

        Args:
            x_NI: rows.
            by: the block's own weights, or of each row those of its expert.

        Raises:
            NotImplementedError: if the structure multiplies in `product` only.
        """
        raise NotImplementedError  # no stub: only structures for mixtures have it; `Experts` asks

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
            **option_values(self.options),
        }

    def extra_repr(self) -> str:
        """Show the spec the way `nn.Linear` shows its sizes."""
        return ", ".join(f"{k}={v}" for k, v in self.spec().items() if k != "structure")


class Own:
    """Products with the weights of one block; its `nn.Linear` are called as modules.

    Args:
        block: the block.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Call the module: what other libraries add to one takes part."""
        y: Tensor = getattr(self.block, name)(x)
        return y

    def bmm(self, x_GNK: Tensor, name: str) -> Tensor:
        """Multiply."""
        return torch.bmm(x_GNK, getattr(self.block, name))

    def take(self, x_NC: Tensor, name: str) -> Tensor:
        """Choose."""
        return take_channels(x_NC, getattr(self.block, name).flatten())

    def of(self, name: str) -> Own:
        """Go inside."""
        return Own(getattr(self.block, name))


def option_values(options: Any) -> dict[str, Any]:
    """Return the options that differ from their defaults, by name."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {f.name: values[f.name] for f in fields(options) if values[f.name] != f.default}


@cache
def _option_types(cls: type[StructuredLinear]) -> dict[str, Any]:
    return get_type_hints(cls.Options)


def _is_of(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type: int, float, str, bool, None, a Literal or a union."""
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of(value, each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def _in_words(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        kinds = [each for each in get_args(kind) if each is not NoneType]
        return " or ".join(map(_in_words, kinds))
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    return {int: "a whole number", float: "a number", str: "a text"}.get(kind, "true or false")


def empty_linear(in_features: int, out_features: int, **kind: Any) -> nn.Linear:
    """Return a plain `nn.Linear` without bias whose weight, (out, in), is not drawn.

    Args:
        in_features: input channels.
        out_features: output channels; may be none.
        kind: `device` and `dtype`, as `torch.empty` takes them.
    """
    linear = nn.Linear(in_features, 1, bias=False, device="meta")  # its own would draw numbers
    linear.out_features = out_features
    linear.weight = nn.Parameter(torch.empty(out_features, in_features, **kind))
    mark_initialized(linear)  # or an architecture draws it by its own rules
    return linear


def take_channels(x: Tensor, order: Tensor) -> Tensor:
    """Return the channels `order` (K,) of x (..., C), as (..., K).

    Args:
        x: values.
        order: channels, int64.
    """
    if x.device.type == "cpu" and x.element_size() == 2:
        # torch selects channels of two bytes one by one, and gathers them twice as fast.
        return x.gather(-1, order.expand(*x.shape[:-1], -1))
    return x.index_select(-1, order)


def _transposed_linear(
    in_features: int,
    out_features: int,
    *,
    bias: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Conv1D:
    """Return transformers' `Conv1D` of these sizes; its weight is (in, out).

    Raises:
        ValueError: if it is to have no bias.
    """
    if not bias:
        raise ValueError("conv1d always has a bias")
    with nullcontext() if device is None else torch.device(device):
        module = Conv1D(out_features, in_features)
    return module.to(dtype)


PLAIN: dict[str, Callable[..., nn.Module]] = {"linear": nn.Linear, "conv1d": _transposed_linear}
"""Dense maps whose sizes differ from the base config's, as torch and transformers have them.

They are in checkpoints where widths differ from layer to layer, or where an architecture has no
config field for the width of its MLPs (BLOOM): the base class builds the wrong size."""
_FILES = {"factored_embedding": "factored", "factored_head": "factored"}
"""Names that are not their files' own."""


def structure_class(name: str) -> type[nn.Module]:
    """Return the class behind a structure's name: in a file beside this one, or a plug-in.

    Not those of plain dense maps, which only `build` knows.

    Raises:
        ValueError: if no structure has that name.
        ModuleNotFoundError: if the structure's own imports fail.
    """
    package = __name__.rpartition(".")[0]
    # The name comes from recipes and checkpoints: only a plain word may reach the importer.
    if re.fullmatch(r"[a-z][a-z0-9_]*", name):
        file = f"{package}.{_FILES.get(name, name)}"
        try:
            module = importlib.import_module(file)
        except ModuleNotFoundError as error:
            if error.name != file:
                raise
        else:
            for value in vars(module).values():
                if isinstance(value, type) and value.__dict__.get("name") == name:
                    return value
    # The installed package also knows plug-ins; its copy inside a checkpoint knows its own files.
    plug_in = getattr(sys.modules[package], "plug_in", None)
    found: type[nn.Module] | None = plug_in(name) if plug_in else None
    if found is None:
        raise ValueError(f"structure {name!r} is not known")
    return found


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
    name = str(options.pop("structure", ""))
    make = PLAIN.get(name) or structure_class(name)
    try:
        return make(**options, device=device, dtype=dtype)
    except (TypeError, OptionError) as error:
        raise ValueError(f"structure {spec['structure']!r}: {error}") from error
