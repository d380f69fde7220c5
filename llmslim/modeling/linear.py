"""An ordinary dense projection whose sizes differ from what the base model's config says.

Needed where widths differ from layer to layer, or where an architecture has no config field for
its MLP width (BLOOM): the base class would build the wrong size, a site entry corrects it.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn


class Linear(nn.Linear):
    """`nn.Linear` under a name that checkpoints can ask for."""

    name: ClassVar[str] = "linear"
