"""Grouped pointwise convolutions: the blocks of the kphi-3 report.

Variant `io`, used by every published kphi-3 projection. Two grouped linear maps side by side,
both reading the input, so that each output group g sees two sets of channels:

    y[:, g] = x[:, g i : (g+1) i] @ W1[g]  +  x[:, g :: G] @ W2[g]        g = 0 .. G-1

the contiguous block g and the residue class g modulo G ("interleave, then group"). Held here as
one parameter, [W1[g]; W2[g]] stacked to (G, 2i, o), so that both branches are one batched product
over 2i gathered channels; the naive two einsums read and write the output twice. 2IO/G weights.

Which channels a group sees is an accident of their numbering. With `channel_order: learned` an
index buffer names 2i channels for each group instead, y[:, g] = x[:, order[g]] @ [W1[g]; W2[g]]; it
is fitted with the weights and never trained.

Variant `residual`, the serial block of the earlier vision papers: grouped, interleaved, grouped
again, with a skip connection:

    h = act(x G1);  y = act(interleave(h) G2) + h        if I >= O
                    y = interleave(h)                    otherwise

IO/G + O²/G weights, or IO/G. With an activation it is no longer linear, no dense matrix equals it.

Shapes: I = in_features, O = out_features, G = groups, i = I/G, o = O/G, N = rows of x.
Source: Schuler et al. 2022, "Grouped Pointwise Convolutions Reduce Parameters in Convolutional
Neural Networks"; Schuler, "Saving 77% of the Parameters in Large Language Models" (kphi-3). The
published code keeps W1 and W2 as two tensors and draws them at another scale (`llmslim.init`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .compat import ACTIVATIONS
from .sizes import (
    KeepRatio,
    OptionError,
    StaysDense,
    budget,
    check_groups,
    common_divisors,
    groups_for_min_channels,
)
from .structured import Own, Products, StructuredLinear

# On a processor: gathered input that is read before it leaves the caches, and whose memory then
# serves the next rows. Measured by benchmarks/bench_blocks.py.
_GATHER_BYTES = 2**22


class GroupedPointwise(StructuredLinear):
    """A grouped pointwise convolution, variant `io` or `residual`; see the module's text.

    Example:
        >>> block = GroupedPointwise(8, 12, groups=2)
        >>> block(torch.ones(3, 8)).shape, block.weight.shape
        (torch.Size([3, 12]), torch.Size([2, 8, 6]))
    """

    name: ClassVar[str] = "grouped_pointwise"
    buffer_names: ClassVar[tuple[str, ...]] = ("order",)

    @dataclass(frozen=True)
    class Options:
        """Options in a recipe: at most one of the first three."""

        groups: Annotated[int | None, "Number of groups G; must divide both sizes."] = None
        min_channels_per_group: Annotated[
            int | None,
            "As many groups as leave each this many input channels; 256, the kphi-3 report's, "
            "where no size is given.",
        ] = None
        keep_ratio: KeepRatio = None
        variant: Annotated[
            Literal["io", "residual"],
            "`io` (two branches side by side, the kphi-3 block) or `residual` (serial, with a "
            "skip).",
        ] = "io"
        activation: Annotated[
            str | None, "Variant residual only: an activation inside the block."
        ] = None
        channel_order: Annotated[
            Literal["fixed", "learned"],
            "Variant io only: `learned` also fits which input channels each group sees.",
        ] = "fixed"

    order: Tensor | None
    """Channels that each group sees, shape (G, 2i), int64; None where the order is fixed."""

    @classmethod
    def resolve(cls, in_features: int, out_features: int, options: Options) -> Options:
        """Return explicit groups; the other options stay.

        Raises:
            StaysDense: if these sizes leave nothing to group.
            OptionError: if more than one of the three ways to choose G is used, or one option is
                wrong.
        """
        _check_variant(options.variant, options.activation, options.channel_order)
        groups, keep_ratio = options.groups, options.keep_ratio
        least = options.min_channels_per_group
        if sum(given is not None for given in (groups, least, keep_ratio)) > 1:
            raise OptionError(
                "", "grouped_pointwise takes one of groups, min_channels_per_group and keep_ratio"
            )
        if keep_ratio is not None:
            allowed = budget(in_features, out_features, keep_ratio)
            for groups in common_divisors(in_features, out_features):
                if _count(in_features, out_features, groups, options.variant) <= allowed:
                    break
            else:
                raise StaysDense(f"no number of groups keeps it within {allowed:,} parameters")
        elif groups is None:
            least = 256 if least is None else least
            if least < 1:
                key = "min_channels_per_group"
                raise OptionError(key, f"{key} {least}; allowed 1 or more")
            groups = groups_for_min_channels(in_features, out_features, least)
            weights = _count(in_features, out_features, groups, options.variant)
            if groups > 1 and weights >= in_features * out_features:
                raise StaysDense(f"{groups} groups have as many weights as the dense projection")
        if check_groups(in_features, out_features, groups) == 1:
            raise StaysDense("one group is the dense projection")
        return replace(options, groups=groups, keep_ratio=None, min_channels_per_group=None)

    @classmethod
    def is_linear(cls, options: Options) -> bool:
        """Return whether it has no activation."""
        return options.activation is None

    def create(self, **kind: Any) -> None:
        """Make the grouped maps, and the order where it is learned."""
        options = self.options
        self.groups: int = options.groups or 1  # nothing to group: one group, the dense projection
        self.variant: str = options.variant
        self.activation: str | None = options.activation
        self.act = nn.Identity() if self.activation is None else ACTIVATIONS[self.activation]
        i, o = self.in_features // self.groups, self.out_features // self.groups
        # One group sees every channel already: there is nothing for a second branch to add.
        branches = 2 if self.variant == "io" and self.groups > 1 else 1
        self.weight = nn.Parameter(torch.empty(self.groups, branches * i, o, **kind))
        if _has_second(self.in_features, self.out_features, self.groups, self.variant):
            self.second = nn.Parameter(torch.empty(self.groups, o, o, **kind))
        else:
            self.register_parameter("second", None)
        learned = options.channel_order == "learned"
        shape, device = self.weight.shape[:2], kind["device"]
        order = torch.empty(shape, dtype=torch.int64, device=device) if learned else None
        self.register_buffer("order", order)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights so that white input gives the output variance of `nn.Linear`, 1/3."""
        bound = math.sqrt(1 / self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.second is not None:
            # y = h + second(h): each of the two independent parts carries half the variance.
            self.weight.mul_(math.sqrt(0.5))
            bound = math.sqrt(3 / self.second.shape[1])
            nn.init.uniform_(self.second, -bound, bound)
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Let every group see the channels that it sees without an order, in place."""
        if self.order is not None:
            channel_I = torch.arange(self.in_features)
            sets = [channel_I.reshape(self.groups, -1), channel_I.reshape(-1, self.groups).t()]
            self.order.copy_(torch.cat(sets if self.groups > 1 else sets[:1], dim=1))

    def product(self, x: Tensor) -> Tensor:
        """Return the block's output for x (..., I), bias not added."""
        rows = x.reshape(-1, self.in_features)  # (N, I)
        parts = [self.product_by(part_NI, Own(self)) for part_NI in self._parts(rows)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y.reshape(*x.shape[:-1], self.out_features)

    def product_by(self, x_NI: Tensor, by: Products) -> Tensor:
        """Return the block's output for rows, with the weights that `by` knows."""
        return self._io(x_NI, by) if self.variant == "io" else self._residual(x_NI, by)

    def _parts(self, x_NI: Tensor) -> tuple[Tensor, ...]:
        """Return the rows in parts whose gathered channels stay in a processor's caches."""
        # Not in a traced graph, which must hold for any number of rows, and not in training, where
        # the weight's gradient would be a sum of rounded parts.
        if x_NI.device.type != "cpu" or self._is_training() or torch.compiler.is_compiling():
            return (x_NI,)
        if self.variant != "io" or (self.groups == 1 and self.order is None):
            return (x_NI,)  # nothing is gathered
        part = max(1, _GATHER_BYTES // (2 * self.in_features * x_NI.element_size()))
        parts: tuple[Tensor, ...] = x_NI.split(part)
        return parts

    def _is_training(self) -> bool:
        return self.weight.requires_grad and torch.is_grad_enabled()

    def _io(self, x_NI: Tensor, by: Products) -> Tensor:
        seen = self._seen(x_NI, by).transpose(0, 1)  # (G, N, 2i)
        if self._is_training():
            seen = seen.contiguous()  # the weight's gradient reads it group by group
        return by.bmm(seen, "weight").transpose(0, 1).reshape(x_NI.shape[0], self.out_features)

    def _seen(self, x_NI: Tensor, by: Products) -> Tensor:
        """Return the channels that each group sees, (N, G, 2i)."""
        rows = x_NI.shape[0]
        if self.order is not None:
            return by.take(x_NI, "order").reshape(rows, *self.order.shape)
        if self.groups == 1:
            return x_NI.unsqueeze(1)
        i = self.in_features // self.groups
        residue = x_NI.reshape(rows, i, self.groups).transpose(1, 2)
        return torch.cat((x_NI.reshape(rows, self.groups, i), residue), dim=-1)

    def _residual(self, x_NI: Tensor, by: Products) -> Tensor:
        rows, groups, o = x_NI.shape[0], self.groups, self.out_features // self.groups
        blocks = x_NI.reshape(rows, groups, self.in_features // groups).transpose(0, 1)  # (G, N, i)
        h: Tensor = self.act(by.bmm(blocks, "weight"))  # (G, N, o)
        h_NO = h.transpose(0, 1).reshape(rows, self.out_features)
        interleaved = h_NO.reshape(rows, o, groups).permute(2, 0, 1)  # (G, N, o)
        if self.second is None:
            return interleaved.transpose(0, 1).reshape(rows, self.out_features)
        y: Tensor = self.act(by.bmm(interleaved, "second"))
        return y.transpose(0, 1).reshape(rows, self.out_features) + h_NO

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """Return the equivalent dense weight, shape (O, I).

        Raises:
            ValueError: if the block has an activation, so that no matrix equals it.
        """
        if self.activation is not None:
            raise ValueError(f"a block with activation {self.activation!r} has no dense equivalent")
        if self.variant != "io" or self.groups == 1 or self.order is not None:
            return super().to_dense()
        groups, o = self.groups, self.out_features // self.groups
        i = self.in_features // groups
        each = torch.arange(groups, device=self.weight.device)
        rows_GoI = self.weight.new_zeros(groups, o, self.in_features)
        first, second = self.weight.transpose(1, 2).split(i, dim=2)  # (G, o, i) each
        rows_GoI.view(groups, o, groups, i)[each, :, each] = first
        rows_GoI.view(groups, o, i, groups)[each, :, :, each] += second
        return rows_GoI.flatten(0, 1)


def _has_second(in_features: int, out_features: int, groups: int, variant: str) -> bool:
    return variant == "residual" and groups > 1 and in_features >= out_features


def _count(in_features: int, out_features: int, groups: int, variant: str) -> int:
    """Return 2IO/G for `io`, IO/G plus O²/G where a second part exists for `residual`."""
    branches = 2 if variant == "io" and groups > 1 else 1
    weights = branches * in_features * out_features // groups
    if _has_second(in_features, out_features, groups, variant):
        weights += out_features * out_features // groups
    return weights


def _check_variant(variant: str, activation: str | None, channel_order: str) -> None:
    if activation is not None and variant != "residual":
        raise OptionError("activation", "activation belongs to variant residual")
    if activation is not None and activation not in ACTIVATIONS:
        sentence = f"activation {activation!r} is not one that transformers knows"
        raise OptionError("activation", sentence)
    if channel_order == "learned" and variant != "io":
        raise OptionError("channel_order", "channel_order learned belongs to variant io")
