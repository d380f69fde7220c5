"""Ordinary dense projections whose sizes differ from the base model's config.

Needed where widths differ from layer to layer, or where an architecture has no config field for
its MLP width (BLOOM): the base class would build the wrong size, a site entry corrects it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Conv1D as TransposedLinear


class Linear(nn.Linear):
    """`nn.Linear` under a name that checkpoints can ask for."""

    name: ClassVar[str] = "linear"


class Conv1D(TransposedLinear):
    """transformers' `Conv1D` under a name, so that a checkpoint can say it has other sizes.

    Args:
        in_features: input channels I.
        out_features: output channels O; the weight is (I, O).
        bias: whether a bias is added; it always is.
        device: where the parameters live.
        dtype: the parameters' type.
    """

    name: ClassVar[str] = "conv1d"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features)  # type: ignore[no-untyped-call]
        if not bias:
            raise ValueError("conv1d always has a bias")
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(in_features, out_features, **kind))
        self.bias = nn.Parameter(torch.zeros(out_features, **kind))
        nn.init.normal_(self.weight, std=0.02)
