"""Carry out a plan on a model in memory: drop layers, resize MLPs, put blocks in place."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from llmslim.errors import SlimError
from llmslim.init import Target, initialise, method_named
from llmslim.modeling.modeling_llmslim import become_slim, set_module
from llmslim.modeling.structured import StructuredLinear, build
from llmslim.surgery.depth import apply_changes, drop_layers
from llmslim.surgery.plan import Plan
from llmslim.surgery.report import Report
from llmslim.surgery.sites import dense_weight
from llmslim.surgery.width import resize_mlp

Progress = Callable[[int, int, str], None]
"""Called with how many steps are done, how many there are, and what comes now."""


def quietly(done: int, total: int, what: str) -> None:
    """Tell nobody."""


def rewrite(model: Any, plan: Plan, *, seed: int = 0, progress: Progress | None = None) -> Report:
    """Carry out `plan` on `model`, in place.

    A model that keeps its base class's shape stays of that class; any other becomes the slim
    subclass of it, so that `save_pretrained` writes a checkpoint that loads back.

    Args:
        model: the model the plan was made for.
        plan: what to do.
        seed: seed of random blocks; every site draws from its own stream.
        progress: told about every site.

    Returns:
        The ledger, with the error of every fitted block.

    Raises:
        SlimError: if the model is not the one the plan was made for.
    """
    tell = progress or quietly
    for mlp in plan.mlps:
        assert plan.recipe.width is not None
        resize_mlp(model, mlp, plan.recipe.width.intermediate_size)
    total, errors = len(plan.sites), {}
    for done, site in enumerate(plan.sites):
        tell(done, total, site.name)
        method = method_named(site.init)
        old = _dense_at(model, site.name)
        weight = old.weight
        # Made without memory first: drawing weights that the method overwrites would cost time and
        # move the caller's random state.
        block = build(site.spec, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
        assert isinstance(block, StructuredLinear)
        bias = None if old.bias is None else old.bias.data
        # A stream of its own for each site: results do not depend on what else is replaced.
        stream = seed * 0x1_0000_0001 ^ zlib.crc32(site.name.encode())
        target = Target(dense_weight(old).float(), bias, stream)
        errors[site.name] = initialise(block, target, method)
        block.train(old.training)
        set_module(model, site.name, block)
    if plan.layers and plan.keep_layers is not None:
        drop_layers(model, plan.layers, plan.keep_layers)
    apply_changes(model.config.get_text_config(), plan.text_config)
    specs = _existing_sites(model, plan) | plan.resized
    specs |= {site.new_name: site.spec for site in plan.sites}
    if specs:
        become_slim(model, specs)
    rows = [replace(row, init_error=errors.get(row.name)) for row in plan.rows]
    return replace(plan.report(), rows=tuple(rows))


def _dense_at(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise SlimError(f"{name}: not in this model; the plan was made for another one.") from error


def _existing_sites(model: Any, plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the blocks that an already slim model keeps, under their new names."""
    existing = getattr(model.config, "llmslim", {}).get("sites", {})
    dropped = {row.name for row in plan.rows if row.action == "dropped"}
    return {plan.new_name(name): spec for name, spec in existing.items() if name not in dropped}
