"""Give a model whose modules are as planned the config that builds it, and prove that it does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from llmslim.anatomy import first_difference
from llmslim.editing.plans import Plan
from llmslim.editing.resize import resize_on_meta
from llmslim.errors import TargetError
from llmslim.modeling.depth import drop_layers, set_attributes, set_fields
from llmslim.modeling.modeling_llmslim import become_slim, refresh_ties, replace_sites


def finalise(model: Any, plan: Plan) -> None:
    """Give a model whose modules are as planned the layers, config and class that go with them.

    Args:
        model: rewritten site by site; on the meta device where only names and shapes matter.
        plan: what was done to it.
    """
    slim = getattr(model.config, "llmslim", {})
    record = slim.get("depth")
    if plan.layers and plan.keep_layers is not None and plan.depth is not None:
        drop_layers(model, plan.layers.path, plan.keep_layers)
        record = plan.depth.record
    specs = _existing_sites(model, plan) | plan.resized
    specs |= {site.new_name: site.spec for site in plan.sites}
    attributes = plan.depth.attributes if plan.depth is not None else {}
    for name, values in attributes.items():
        set_attributes(model.get_submodule(name), values)
    if specs or record or slim:
        become_slim(model, specs, record)
    else:
        refresh_ties(model)
    set_fields(model, plan.text_config)


def check_described(model: Any, plan: Plan) -> None:
    """Make sure that a plan's config builds the model that the plan makes; no weight is needed.

    Args:
        model: the model the plan was made for; looked at only.
        plan: what is to be done to it.

    Raises:
        TargetError: if a checkpoint with that config would compute something else.
    """
    if not isinstance(model, PreTrainedModel) or not (plan.depth or plan.mlps):
        return  # blocks are put in place by the very function that loading uses
    with torch.device("meta"):
        made = type(model)(copy.deepcopy(model.config))
        known = dict(made.named_modules()) | dict(made.named_parameters())
        if not all(name in known for name in _touched(plan)):
            return  # a model whose modules somebody has exchanged: no config builds it as it is
        for each in plan.mlps:
            resize_on_meta(made, each.mlp, each.width)
        replace_sites(made, {site.name: site.spec for site in plan.sites})
        problem = ""
        try:
            finalise(made, plan)
            again = type(made)(type(made.config).from_dict(made.config.to_dict()))
        except Exception as error:  # configs and models check themselves, each in its own way
            problem = f"{type(error).__name__}: {error}".partition("\n")[0]
    problem = problem or first_difference(made, again)
    if problem and not _rebuilt_differs(model):
        raise TargetError(
            f"{plan.recipe.where('depth' if plan.depth else 'replace')}: no config of "
            f"{type(model).__name__} builds what the recipe makes of it ({problem}). Change the "
            "recipe."
        )


def _touched(plan: Plan) -> Iterator[str]:
    """Yield the names of what a plan replaces or resizes."""
    yield from (site.name for site in plan.sites)
    yield from (name for each in plan.mlps for name in each.sites)


def _rebuilt_differs(model: Any) -> bool:
    """Return whether a model's config, changed in memory, builds another model as it is."""
    with torch.device("meta"):
        now = type(model)(copy.deepcopy(model.config))
        again = type(model)(type(model.config).from_dict(model.config.to_dict()))
    return first_difference(now, again) != ""


def _existing_sites(model: Any, plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the blocks that an already slim model keeps, under their new names."""
    existing = getattr(model.config, "llmslim", {}).get("sites", {})
    dropped = {row.name for row in plan.rows if row.action == "dropped"}
    return {plan.new_name(name): spec for name, spec in existing.items() if name not in dropped}
