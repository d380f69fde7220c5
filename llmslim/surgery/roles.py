"""Find what each projection is in its decoder layer, from the structure of the model."""

from __future__ import annotations

from torch import nn

from llmslim.surgery.sites import find_experts, find_sites


def find_roles(model: nn.Module) -> dict[str, str]:
    """Return the role of every dense map by name, in the model's order; empty where it has none.

    Args:
        model: a causal language model, on any device.
    """
    return dict.fromkeys([*find_sites(model), *find_experts(model)], "")
