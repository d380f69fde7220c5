"""Say which blocks the usual quantisers will leave as they are.

bitsandbytes, torchao and quanto quantise weights of `nn.Linear` modules. Blocks made of those go
with the rest of a model; the weights of grouped blocks, and of all experts, are parameters
of their own, which these tools pass by without a word.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from llmslim.editing.plans import SitePlan
from llmslim.errors import and_more
from llmslim.modeling.structured import build

_SHOWN = 4
"""Names that the sentence lists at most."""


def unquantised(sites: Iterable[SitePlan]) -> list[str]:
    """Return a sentence on the blocks whose weights quantisers pass by; none where there are none.

    Args:
        sites: the blocks of a plan.
    """
    skipped = [(site, count) for site in sites if (count := _outside_linears(site))]
    if not skipped:
        return []
    structures = ", ".join(sorted({_structure(site) for site, _ in skipped}))
    weights, names = sum(count for _, count in skipped), [site.name for site, _ in skipped]
    return [
        f"bitsandbytes, torchao and quanto quantise linear layers only: {weights:,} weights in "
        f"{len(names)} blocks ({structures}) keep their type: {and_more(names, _SHOWN)}."
    ]


def _structure(site: SitePlan) -> str:
    spec = site.spec["of"] if site.is_experts else site.spec
    return str(spec["structure"])


def _outside_linears(site: SitePlan) -> int:
    """Return how many weights of a block belong to no `nn.Linear`."""
    return sum(
        parameter.numel()
        for module in build(site.spec, device="meta").modules()
        for parameter in module.parameters(recurse=False)
        if not isinstance(module, nn.Linear) and parameter.dim() > 1
    )
