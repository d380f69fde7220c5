"""Put one block in the place of a dense map, or one for each expert in the place of a stack."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.anatomy.sites import dense_weight, outer_modules
from llmslim.editing.plans import Plan, SitePlan
from llmslim.errors import SlimError
from llmslim.init import Method, Target, initialise, method_named, wide
from llmslim.modeling.experts import Experts
from llmslim.modeling.modeling_llmslim import set_module, site_weight
from llmslim.modeling.structured import StructuredLinear, build

_MOST = (1 << 63) - 1
"""The largest seed that torch takes."""


def seed_of(name: str, seed: int) -> int:
    """Return a site's own seed: results do not depend on what else is replaced."""
    return (seed * 0x1_0000_0001 ^ zlib.crc32(name.encode())) & _MOST


def fill_site(model: Any, site: SitePlan, seed_of: Callable[[str], int]) -> float | None:
    """Put one block, made from the dense weight alone, in place.

    Args:
        model: holds the dense map; the rest of it may be on the meta device.
        site: what takes its place.
        seed_of: the seed of a site, by its name.

    Returns:
        The block's error, see `initialise`.

    Raises:
        SlimError: if the model has no such map.
    """
    if site.is_experts:
        return put_experts(model, site, seed_of)
    old = _dense_at(model, site.name)
    bias = None if old.bias is None else old.bias.data
    weight = dense_weight(old)
    if method_named(site.init).fits:  # the others do not look at it: spare the copy
        weight = wide(weight)
    return put_block(model, site, old, Target(weight, bias, seed_of(site.name)))


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
    for name in (site.name, *site.also):
        set_module(model, name, block)
    return error


@torch.no_grad()
def put_experts(model: nn.Module, site: SitePlan, seed_of: Callable[[str], int]) -> float | None:
    """Put a block for each expert where the stack of their matrices was, in place.

    They are fitted one after the other, so that no more than one matrix is in float32 at a time.

    Args:
        model: the model that holds the stack.
        site: what takes its place.
        seed_of: the seed of an expert, by its name.

    Returns:
        The blocks' error over all experts, relative to all their weights; see `initialise`.
    """
    stack = site_weight(model, site.name).data
    method = method_named(site.init)
    experts = empty_experts(site, stack)
    lost = whole = 0.0
    for expert, weight in enumerate(stack):
        # The others do not look at the weight: spare the copy.
        weight_OI = weight.t() if experts.transposed else weight
        if method.fits:
            weight_OI = wide(weight_OI)
        target = Target(weight_OI, None, seed_of(f"{site.name}.{expert}"))
        error = fill_expert(experts, expert, target, method)
        if error is not None:
            power = float(weight_OI.square().sum())
            lost, whole = lost + error * power, whole + power
    parent = model.get_submodule(site.name.rpartition(".")[0])
    experts.train(parent.training)
    set_module(model, site.name, experts)
    if not method.fits:
        return None
    return lost / whole if whole else 0.0


def empty_experts(site: SitePlan, stack: Tensor) -> Experts:
    """Return blocks for a stack of experts, not filled yet.

    Args:
        site: what takes the stack's place.
        stack: the parameter; the blocks are of its type and on its device.
    """
    # Made without memory first, see above.
    experts = build(site.spec, device="meta", dtype=stack.dtype).to_empty(device=stack.device)
    assert isinstance(experts, Experts)
    return experts


def fill_expert(experts: Experts, expert: int, target: Target, method: Method) -> float | None:
    """Fill one expert's block, in place.

    Args:
        experts: the blocks.
        expert: which of them.
        target: what it is fitted to.
        method: how.

    Returns:
        The block's error, see `initialise`.
    """
    block = build(experts.block_spec, device="meta", dtype=experts.dtype)
    block = block.to_empty(device=experts.device)
    assert isinstance(block, StructuredLinear)
    error = initialise(block, target, method)
    experts.store(expert, block)
    return error


def draw_blocks(model: nn.Module, plan: Plan, method: Method, seed: int) -> None:
    """Fill every block of a model by a method that reads no dense weight, in place.

    Args:
        model: with the blocks of the plan in place, and perhaps others that its config describes.
        plan: names the dense map whose place each block has; the block draws what it would draw if
            it replaced that map.
        method: how.
        seed: of all of them.
    """
    replaced = {site.new_name: site.name for site in plan.sites}
    for name, block in list(outer_modules(model)):
        origin = replaced.get(name, name)
        if isinstance(block, StructuredLinear):
            initialise(block, _nothing(block.spec(), seed_of(origin, seed)), method)
        elif isinstance(block, Experts):
            for expert in range(block.experts):
                target = _nothing(block.block_spec, seed_of(f"{origin}.{expert}", seed))
                fill_expert(block, expert, target, method)


def _nothing(spec: dict[str, Any], seed: int) -> Target:
    """Return a target that has sizes and a seed, and no weight to read."""
    shape = spec["out_features"], spec["in_features"]
    return Target(torch.empty(shape, device="meta"), None, seed)


def _dense_at(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise SlimError(f"{name}: not in this model; the plan was made for another one.") from error
