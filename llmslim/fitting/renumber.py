"""Reorder an MLP's neurons so that the neurons of one group need the same inputs.

The neurons of an MLP may be in any order: if the rows of the projections that produce them and the
columns of the one that reads them are permuted alike, the function is the same. Where the producing
projections are grouped and each group learns its inputs, an order in which the neurons of a group
need similar inputs fits better, and costs nothing to store.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from llmslim.anatomy.sites import Mlp, dense_weight
from llmslim.editing.plans import SitePlan
from llmslim.editing.resize import keep_neurons
from llmslim.fitting.layer_pair import LayerPair
from llmslim.fitting.moments import Moments, corrected_weight
from llmslim.init import damping, learn_outputs, wide


def free_neurons(
    mlps: Iterable[Mlp], group: Iterable[SitePlan], sites: Mapping[str, SitePlan]
) -> Mlp | None:
    """Return the MLP whose neurons some projections produce, if their order is free and matters.

    Args:
        mlps: the model's.
        group: projections that read one input.
        sites: everything that is planned, by name.
    """
    group = list(group)
    grouped = {site.spec.get("groups") for site in group}
    learned = all(site.spec.get("channel_order") == "learned" for site in group)
    if not learned or len(grouped) != 1:
        return None
    names = {site.name for site in group}

    def any_order(name: str) -> bool:
        spec = sites[name].spec if name in sites else {}
        # A fixed order is the default, so no spec names it.
        return "groups" not in spec or spec.get("channel_order") == "learned"

    # The projection that reads the neurons learns its order, or is dense: any order fits it.
    free = (mlp for mlp in mlps if set(mlp.up) == names and not mlp.fused)
    return next((mlp for mlp in free if any_order(mlp.down)), None)


def renumber(
    mlp: Mlp, model: Any, pair: LayerPair, prefix: str, moments: Moments, groups: int
) -> None:
    """Reorder an MLP's neurons, in place, in the model and in the dense copy of its layer.

    Args:
        mlp: of the model.
        model: the model.
        pair: the MLP's layer.
        prefix: of the layer's name.
        moments: of the MLP's input.
        groups: of the projections that produce the neurons.
    """
    gram_II = moments.fit.gram_II
    gram_II = gram_II + damping(gram_II).diag()
    wanted = []
    for name in mlp.up:
        weight_OI = wide(dense_weight(model.get_submodule(name)))
        wanted.append(corrected_weight(moments, weight_OI, weight_OI))
    neurons = learn_outputs(torch.stack(wanted).cpu(), gram_II.cpu(), groups)
    inside = replace(
        mlp,
        up=tuple(name.removeprefix(prefix) for name in mlp.up),
        down=mlp.down.removeprefix(prefix),
    )
    for root, where in ((model, mlp), (pair.dense, inside)):
        down = dense_weight(root.get_submodule(where.down))
        keep_neurons(root, where, neurons.to(down.device), down[:, neurons.to(down.device)])
