"""Make every MLP wider without changing its function, or narrower by its least important neurons.

Wider: neurons are repeated, and the columns of the down projection that read a repeated neuron are
divided by how often it now occurs, so the sum they contribute is what it was (Net2WiderNet, Chen
et al. 2016, arXiv:1511.05641, section 2.2).

Narrower: neuron j scores ‖down column j‖ times the norms of the rows that produce it, and the
highest scores stay, in their order. No data is looked at.

Shapes: I = in_features, O = out_features, M = neurons.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import Conv1D

from llmslim.anatomy import first_difference
from llmslim.anatomy.sites import Mlp, dense_weight
from llmslim.modeling.depth import set_config, set_fields
from llmslim.modeling.modeling_llmslim import other_names, set_module
from llmslim.modeling.sizes import WIDTH_FIELDS

_WIDTH_ATTRIBUTE = re.compile(r"intermediate|inner|ffn|mlp_dim")
"""What modules call the number of their neurons, where they keep it."""


def following_width(model: nn.Module, mlp: Mlp) -> Mlp:
    """Return an MLP with the attributes of its modules that hold its number of neurons."""
    return replace(
        mlp,
        follow=tuple(
            (f"{mlp.name}.{inner}".removesuffix("."), name)
            for inner, module in model.get_submodule(mlp.name).named_modules()
            for name, value in vars(module).items()
            if _WIDTH_ATTRIBUTE.search(name) and type(value) is int and value == mlp.width
        ),
    )


def width_field(model: Any, mlps: Sequence[Mlp], width: int) -> dict[str, Any] | None:
    """Return the change to a text config that gives MLPs another width, and changes nothing else.

    The field is found by trying: a model is built from the changed config and compared with one
    whose MLPs were resized, so that a field which sizes experts too, or means something else, is
    never taken.

    Args:
        model: a causal language model; looked at only.
        mlps: its MLPs, all that are to have the width.
        width: neurons wanted.

    Returns:
        The field and its value; None where the architecture has no such field (BLOOM).
    """
    resized: Any = None
    for field in WIDTH_FIELDS:
        config = copy.deepcopy(model.config)
        text = config.get_text_config()
        real = text.attribute_map.get(field, field)
        if not hasattr(text, real) or isinstance(getattr(text, real), list):
            continue
        try:
            set_config(text, {real: width})
            trial = _without_weights(type(model), type(config).from_dict(config.to_dict()))
        except (ValueError, StrictDataclassError):  # a config may check its fields
            continue
        if resized is None:
            resized = _without_weights(type(model), copy.deepcopy(model.config))
            for mlp in mlps:
                resize_on_meta(resized, mlp, width)
        set_fields(resized, {real: width})
        if not first_difference(resized, trial):
            return {real: width}
        set_fields(resized, {real: getattr(model.config.get_text_config(), real)})
    return None


def _without_weights(cls: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = cls(config)
    return model


def resize_on_meta(model: nn.Module, mlp: Mlp, width: int) -> None:
    """Give one MLP of a model on the meta device another number of neurons, in place."""
    down_OM = dense_weight(model.get_submodule(mlp.down))
    neurons = torch.zeros(width, dtype=torch.long, device="meta")
    keep_neurons(model, mlp, neurons, down_OM.new_empty(len(down_OM), width))


def resize_mlp(model: nn.Module, mlp: Mlp, width: int) -> None:
    """Give one MLP another number of neurons without looking at data, in place.

    Args:
        model: the model that holds it.
        mlp: where its sites are.
        width: neurons wanted; more are made by repeating, fewer by dropping.
    """
    down_OM = dense_weight(model.get_submodule(mlp.down))
    if width >= mlp.width:
        neurons = torch.arange(width, device=down_OM.device) % mlp.width
        times = torch.bincount(neurons, minlength=mlp.width)[neurons]
        columns = down_OM[:, neurons] / times.to(down_OM)
    else:
        score = down_OM.float().norm(dim=0)
        for name in mlp.up:
            weight = dense_weight(model.get_submodule(name)).float()
            rows = weight.reshape(-1, mlp.width, down_OM.shape[0])
            score = score * rows.norm(dim=2).prod(dim=0)
        neurons = score.topk(width).indices.sort().values
        columns = down_OM[:, neurons]
    keep_neurons(model, mlp, neurons, columns)


def keep_neurons(model: nn.Module, mlp: Mlp, neurons: Tensor, columns: Tensor) -> None:
    """Rebuild an MLP from some of its neurons, in place, in every layer that shares it.

    Args:
        model: the model that holds it.
        mlp: where its sites are.
        neurons: which, in their new order; a neuron may occur more than once.
        columns: what the down projection makes of them, (O, number of neurons).
    """
    down = model.get_submodule(mlp.down)
    also = other_names(model, {mlp.down, *mlp.up})
    names = [mlp.down, *also.get(mlp.down, ())]
    _put(model, names, down, columns.to(dense_weight(down)), _bias(down))
    for name in mlp.up:
        up = model.get_submodule(name)
        halves = torch.arange(2 if mlp.fused else 1, device=neurons.device) * mlp.width
        rows = (halves[:, None] + neurons).flatten()
        bias = _bias(up)
        names = [name, *also.get(name, ())]
        _put(model, names, up, dense_weight(up)[rows], None if bias is None else bias[rows])
    for name, attribute in mlp.follow:
        setattr(model.get_submodule(name), attribute, len(neurons))


def _bias(module: nn.Module) -> Tensor | None:
    bias = module.bias
    return None if bias is None else bias.data  # type: ignore[return-value]


def _put(
    model: nn.Module, names: list[str], old: nn.Module, weight_OI: Tensor, bias: Tensor | None
) -> None:
    """Put a dense map of the old one's kind, but of the weight's sizes, wherever that one is."""
    out_features, in_features = weight_OI.shape
    new: nn.Module
    if isinstance(old, Conv1D):
        new = Conv1D(out_features, in_features)
        new.weight = nn.Parameter(weight_OI.t().contiguous())
    else:
        new = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
        new.weight = nn.Parameter(weight_OI.contiguous())
    if bias is not None:
        new.bias = nn.Parameter(bias.clone())
    new.train(old.training)
    for name in names:
        set_module(model, name, new)
