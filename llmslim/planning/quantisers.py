"""Say which blocks the usual quantisers will leave as they are.

bitsandbytes, torchao and quanto quantise weights of `nn.Linear` modules. Blocks made of those go
with the rest of a model; the weights of grouped blocks, and of all experts, are parameters
of their own, which these tools pass by without a word; `editing/quantised.py` quantises those.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmslim.editing.plans import SitePlan
from llmslim.editing.quantised import outside_linears
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
        f"{len(names)} blocks ({structures}) keep their type: {and_more(names, _SHOWN)}. "
        "llmslim.quantize_blocks(model, bits=4) quantises these."
    ]


def _structure(site: SitePlan) -> str:
    spec = site.spec["of"] if site.is_experts else site.spec
    return str(spec["structure"])


def _outside_linears(site: SitePlan) -> int:
    """Return how many weights of a block belong to no `nn.Linear`."""
    block = build(site.spec, device="meta")
    return sum(weight.numel() for _, _, weight in outside_linears(block))
