"""Fit each expert of a stack to the tokens that are routed to it.

The dense parameter is watched at work: a stand-in takes its place, computes what it computes and
shows what each expert is given, whatever loop the architecture has around it. Each expert's block
is then fitted so that its outputs on those tokens are the dense expert's.

The tokens are the slim stream's, by the slim stream's routing. The dense stream's moments, which
other projections have, are left out: a token that the streams send to different experts has no
output of the same expert to compare with. For the same reason no expert repairs what others broke.

An expert that saw no token is fitted to those of all experts. One that saw few is not: mixing in
others' tokens made held-out errors larger (docs/architecture.md); damping is what few tokens need.

Shapes: E = experts, N = rows, I = in_features, O = out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.editing.blocks import empty_experts, fill_expert
from llmslim.editing.plans import SitePlan
from llmslim.init import GramAccumulator, Target, method_named, output_power, wide
from llmslim.modeling.experts import Experts
from llmslim.modeling.modeling_llmslim import set_module

GRAM_BYTES = 1 << 30
"""Gram matrices of experts that are gathered in one pass; where they are more, in several.

About what the moments of an ordinary projection with 4,096 inputs and outputs take, so that the
number of experts does not decide how much memory a fit takes. One matrix is gathered in any case.
"""


class Watched(Experts):
    """The dense stack itself, called as a module for every product: hooks see the inputs.

    Args:
        weight: the parameter, (E, O, I) or transposed (E, I, O).
        transposed: which of them.

    Example:
        >>> stack, seen = Watched(nn.Parameter(torch.ones(8, 4, 6))), []
        >>> hook = stack.register_forward_pre_hook(lambda _module, args: seen.append(args[1]))
        >>> torch.nn.functional.linear(torch.ones(3, 6), stack[5]).shape, seen
        (torch.Size([3, 4]), [5])
    """

    def __init__(self, weight: nn.Parameter, *, transposed: bool = False) -> None:
        nn.Module.__init__(self)
        self.weight, self.transposed = weight, transposed
        self.experts, *sizes = weight.shape
        in_features, out_features = sizes if transposed else reversed(sizes)
        self.block_spec = {"in_features": in_features, "out_features": out_features}

    @property
    def takes_rows(self) -> bool:
        """Whether rows of several experts can be multiplied at once: hooks want them apart."""
        return False

    def product(self, x: Tensor, expert: int | None) -> Tensor:
        """Multiply as `forward` does, with the hooks."""
        y: Tensor = self(x, expert)
        return y

    def forward(self, x: Tensor, expert: int | None) -> Tensor:
        """Multiply x (N, I) with one expert's matrix, or x (E, N, I) with each its own."""
        matrix = self.weight if expert is None else self.weight[expert]
        return x @ (matrix if self.transposed else matrix.mT)


@dataclass
class Seen:
    """How many tokens the experts of a stack saw."""

    experts: int = 0
    short: int = 0
    """Of the experts, those that saw fewer tokens than they have input channels."""
    tokens: int = 0
    skipped: int = 0
    """Tokens left out because a value was not finite."""

    def notes(self, name: str) -> list[str]:
        """Return what a reader of the report must know of the stack of that name, if anything."""
        if not self.short:
            return []
        return [
            f"{name}: {self.short:,} of {self.experts:,} experts saw fewer calibration tokens than "
            "they have input channels: their fits know little. More text helps."
        ]


@contextmanager
def watching(model: nn.Module, sites: Iterable[SitePlan]) -> Iterator[None]:
    """Put stand-ins where stacks of experts are, temporarily.

    Args:
        model: the model that holds the stacks.
        sites: the stacks; all of them will be replaced, so their module may keep its plain loop.
    """
    stacks = {site.name: model.get_parameter(site.name) for site in sites}
    for site in sites:
        transposed = site.spec["transposed"]
        set_module(model, site.name, Watched(stacks[site.name], transposed=transposed))
    try:
        yield
    finally:
        for name, stack in stacks.items():
            holder, leaf = _holder(model, name)
            delattr(holder, leaf)
            holder.register_parameter(leaf, stack)


@torch.no_grad()
def fit_experts(
    model: nn.Module, site: SitePlan, run: Callable[[], None], seed_of: Callable[[str], int]
) -> Seen:
    """Put a block for each expert where the stack was, fitted to its tokens, in place.

    Args:
        model: the model that holds the stack.
        site: what takes its place.
        run: runs the layer around the stack over the windows to fit on.
        seed_of: the seed of an expert, by its name.
    """
    stack, method = model.get_parameter(site.name), method_named(site.init)
    seen = Seen()
    blocks = empty_experts(site, stack)
    with watching(model, [site]):
        watched: Any = model.get_submodule(site.name)
        channels = watched.block_spec["in_features"]
        rest: GramAccumulator | None = GramAccumulator(channels, device=stack.device)
        for group in _groups(watched):
            moments = _gather(watched, run, group, rest)
            if rest is not None:  # the first pass sees all experts' tokens, the others their own
                everything_II, rest = _pooled([*moments.values(), rest]), None
            for expert in group:
                own = moments.pop(expert)
                weight_OI = wide(_matrix(stack, expert, watched.transposed))
                seed = seed_of(f"{site.name}.{expert}")
                gram_II = own.gram_II if own.tokens else everything_II
                target = Target(weight_OI, None, seed, gram_II)
                fill_expert(blocks, expert, target, method)
                seen.experts += 1
                seen.short += own.tokens < channels
                seen.tokens += own.tokens
                seen.skipped += own.skipped
    set_module(model, site.name, blocks.train(_holder(model, site.name)[0].training))
    return seen


@torch.no_grad()
def experts_error(
    model: nn.Module, site: SitePlan, dense: Tensor, run: Callable[[], None]
) -> float:
    """Return the blocks' squared output error over all experts, relative to the dense outputs.

    Args:
        model: the model that holds the blocks.
        site: where they are.
        dense: the stack that they replaced.
        run: runs the layer around them over the windows to measure on.
    """
    blocks: Any = model.get_submodule(site.name)
    watched = Watched(nn.Parameter(dense, requires_grad=False), transposed=blocks.transposed)
    lost = whole = 0.0
    set_module(model, site.name, watched)
    try:
        for group in _groups(watched):
            moments = _gather(watched, run, group)
            for expert in group:
                own = moments.pop(expert)
                weight_OI = _matrix(dense, expert, watched.transposed).double()
                block_OI = blocks.block(expert).to_dense().double()
                lost += own.tokens * output_power(weight_OI - block_OI, own.gram_II)
                whole += own.tokens * output_power(weight_OI, own.gram_II)
    finally:
        set_module(model, site.name, blocks)
    return max(lost, 0.0) / whole if whole > 0 else 0.0


def _groups(stack: Watched) -> Iterator[range]:
    """Yield the experts whose Gram matrices fit in memory together."""
    size = max(1, GRAM_BYTES // (8 * stack.block_spec["in_features"] ** 2))
    for start in range(0, stack.experts, size):
        yield range(start, min(start + size, stack.experts))


def _gather(
    stack: Watched,
    run: Callable[[], None],
    experts: Sequence[int],
    rest: GramAccumulator | None = None,
) -> dict[int, GramAccumulator]:
    """Return the moments of some experts' inputs; `rest` is given those of all others."""
    channels, device = stack.block_spec["in_features"], stack.device
    moments = {expert: GramAccumulator(channels, device=device) for expert in experts}

    def look(_module: nn.Module, args: tuple[Tensor, int | None]) -> None:
        x, one = args
        for expert, rows in enumerate(x) if one is None else [(one, x)]:
            into = moments.get(expert, rest)
            if into is not None:
                # Where all experts are given all tokens, those of others are zeroed.
                into.update(rows[(rows != 0).any(-1)])

    handle = stack.register_forward_pre_hook(look)
    try:
        run()
    finally:
        handle.remove()
    return moments


def _pooled(moments: Sequence[GramAccumulator]) -> Tensor:
    """Return E[x xᵀ] over all tokens of several."""
    tokens = sum(one.tokens for one in moments)
    total = torch.zeros_like(moments[0].gram_II)
    for one in moments:
        total.add_(one.gram_II, alpha=one.tokens / max(tokens, 1))
    return total


def _matrix(stack: Tensor, expert: int, transposed: bool) -> Tensor:
    """Return one expert's matrix the way `nn.Linear` holds it, (O, I), as a view."""
    return stack[expert].t() if transposed else stack[expert]


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf
