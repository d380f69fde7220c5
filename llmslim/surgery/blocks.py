"""Put one block in the place of a dense map."""

from __future__ import annotations

from typing import Any

from torch import nn

from llmslim.init import Target, initialise, method_named
from llmslim.modeling.modeling_llmslim import set_module
from llmslim.modeling.structured import StructuredLinear, build
from llmslim.surgery.plan import SitePlan


def put_block(model: nn.Module, site: SitePlan, old: Any, target: Target) -> float | None:
    """Build a site's block, fill it and put it where the dense map was, in place.

    Args:
        model: the model that holds the dense map.
        site: what takes its place.
        old: the dense map.
        target: what the block is fitted to.

    Returns:
        The block's error, see `initialise`.
    """
    # Made without memory first: drawing weights that the method overwrites would cost time and
    # move the caller's random state.
    block = build(site.spec, device="meta", dtype=old.weight.dtype)
    block = block.to_empty(device=old.weight.device)
    assert isinstance(block, StructuredLinear)
    error = initialise(block, target, method_named(site.init))
    block.train(old.training)
    set_module(model, site.name, block)
    return error
