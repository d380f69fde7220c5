"""List a model's parameters as rows, before any decision about them.

Every parameter is in exactly one row: a stack of expert matrices has a row, any other parameter is
in the row of its module. A parameter that two modules share counts for the first of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from llmslim.anatomy.module_kinds import module_kind
from llmslim.anatomy.sites import Site, outer_modules
from llmslim.modeling.experts import Experts
from llmslim.modeling.structured import StructuredLinear
from llmslim.report.report import Kind, Row

_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")
"""Keys of configs for the number of experts that process a token."""


@dataclass(frozen=True)
class Entry:
    """One row, and what a decision about it depends on."""

    row: Row
    """As the model is now: kept, with the kind of module as the reason."""
    site: Site | None
    element_size: int
    """Bytes of one parameter; 0 where another row counts them all."""
    tied_to: str
    """The row that counts shared parameters, if any are shared."""


def entries(model: Any, sites: Mapping[str, Site], fixed: Mapping[str, str]) -> Iterator[Entry]:
    """Yield the row of every parameter of a model, in its order.

    Args:
        model: a causal language model, on any device.
        sites: what can be replaced, experts included, by name.
        fixed: dense maps that cannot be replaced, and why, by name.
    """
    owners: dict[int, str] = {}
    products: dict[str, int] = {}
    head = model.get_output_embeddings()
    slim = (getattr(model.config, "llmslim", None) or {}).get("sites", {})
    blocks = tuple(f"{name}." for name, spec in slim.items() if spec["structure"] == Experts.name)
    for name, module in outer_modules(model):
        is_block = isinstance(module, StructuredLinear) or f"{name}.".startswith(blocks)
        for part, parameters in _parts(name, module, sites):
            own = [p for p in parameters.values() if id(p) not in owners]
            tied_to = next((owners[id(p)] for p in parameters.values() if id(p) in owners), "")
            owners |= {id(p): part for p in own}
            site = sites.get(part)
            kind = _kind(module, is_head=module is head, is_dense=bool(site) or is_block)
            reason = ""
            if site is None:
                reason = "a block already" if is_block else fixed.get(part, "")
                reason = reason or module_kind(module, parameters)
            # A tied map multiplies too.
            flops = 0 if own else products.get(tied_to, 0)
            if site or is_block:
                weights = sum(p.numel() for leaf, p in parameters.items() if leaf != "bias")
                flops = 2 * weights * active_experts(model.config, site) // max(1, _stack(site))
            products[part] = flops
            count = sum(p.numel() for p in own)
            size = sum(p.numel() * p.element_size() for p in own)
            row = Row(
                name=part or "(model)",
                kind=kind,
                action="kept",
                reason=reason,
                in_features=site.in_features if site else None,
                out_features=site.out_features if site else None,
                params_before=count,
                params_after=count,
                bytes_before=size,
                bytes_after=size,
                flops_per_token_before=flops,
                flops_per_token_after=flops,
            )
            yield Entry(row, site, own[0].element_size() if own else 0, tied_to)


def active_experts(config: Any, site: Site | None) -> int:
    """Return how many of a site's matrices process one token; 1 for a module."""
    experts = _stack(site)
    if site is None or not experts or "shared" in site.name:
        return max(1, experts)
    text = config.get_text_config()
    counts = [value for name in _ACTIVE if isinstance(value := getattr(text, name, None), int)]
    return min([experts, *counts])


def _parts(
    name: str, module: nn.Module, sites: Mapping[str, Site]
) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
    """Yield a module's own parameters: stacks of experts one by one, the others together."""
    is_block = isinstance(module, StructuredLinear)  # what is inside is in the row of the block
    rest = dict(module.named_parameters(recurse=is_block))
    stacks = {f"{name}.{leaf}": leaf for leaf in rest if f"{name}.{leaf}" in sites}
    for part, leaf in stacks.items():
        yield part, {leaf: rest.pop(leaf)}
    if rest:
        yield name, rest


def _kind(module: nn.Module, *, is_head: bool, is_dense: bool) -> Kind:
    if is_head:
        return "head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "projection" if is_dense else "other"


def _stack(site: Site | None) -> int:
    return site.experts if site else 0
