"""Fresh weights, scaled so that a block's output varies as a fresh `nn.Linear`'s does."""

from __future__ import annotations

import torch

from llmslim.init.target import Target
from llmslim.modeling.structured import StructuredLinear

FITS = False


def fit(block: StructuredLinear, target: Target) -> None:
    """Draw new weights for the block, in place; the dense weight is not read.

    Args:
        block: the block to fill.
        target: only its seed is used.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(target.seed)
        block.reset_parameters()
