"""Fit the blocks of one decoder layer, in the order its projections run.

- A projection inside the layer is fitted so that its output on the *slim* stream is the dense
  projection's output on the dense stream.
- A projection that writes to the residual stream is fitted to *the dense stream after it minus the
  slim stream before it*: it also repairs what every block before it broke.
- An MLP that is to be narrower keeps the neurons whose loss costs least (see `neurons`), and its
  down projection is refitted to the same residual target.

All three reduce to a weight and a Gram matrix (`corrected_weight`), so every structure and method
works here unchanged.

Shapes: D = hidden size, I = in_features, O = out_features, M = neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from llmslim.anatomy.sites import Mlp, dense_weight
from llmslim.editing.blocks import put_block, put_experts
from llmslim.editing.plans import MlpPlan, SitePlan
from llmslim.editing.resize import keep_neurons
from llmslim.fitting.experts import Seen, experts_error, fit_experts, watching
from llmslim.fitting.layer_pair import LayerOutputs, LayerPair
from llmslim.fitting.layer_store import Fitted, Streams
from llmslim.fitting.moments import Moments, corrected_weight, target_error
from llmslim.fitting.neurons import eliminate
from llmslim.fitting.refine import refine_layer
from llmslim.fitting.renumber import free_neurons, renumber
from llmslim.init import GramAccumulator, Target, method_named, wide
from llmslim.recipe import Refine

Step = list[SitePlan] | MlpPlan
"""Projections with one input (or one stack of experts), or an MLP that is made narrower."""


@dataclass(frozen=True)
class FitContext:
    """What the fits of all layers have in common."""

    model: nn.Module
    """Changed in place."""
    sites: Mapping[str, SitePlan]
    """Everything that is planned, by name."""
    mlps: Sequence[Mlp]
    """Of the model."""
    narrow: Sequence[MlpPlan]
    """MLPs whose neurons are chosen by the fit."""
    refine: Refine | None
    """How layers are refined; None where they stay as the closed forms made them."""
    seed_of: Callable[[str], int]
    progress: Callable[[str], None]
    """Called with the name of every site once it is done."""


@dataclass
class LayerFit:
    """The fit of one decoder layer."""

    context: FitContext
    prefix: str
    """Of its modules' names, with the dot."""
    pair: LayerPair
    result: Fitted = field(default_factory=Fitted)
    _targets: dict[str, Tensor] = field(default_factory=dict)
    """Dense weights of fitted projections, kept where a refinement measures their errors again."""

    def run(self) -> Streams:
        """Fit what is planned in the layer, in place; return the streams after it."""
        outputs = None
        for step in self._steps():
            outputs = None  # what an earlier step computed is out of date; its memory goes first
            if isinstance(step, MlpPlan):
                outputs = self._narrow(step)
            elif step[0].is_experts:
                self._fit_experts(step[0])
            else:
                outputs = self._fit_group(step)
        if self.context.refine is not None:
            dense = None if outputs is None else outputs.dense
            outputs = None
            outputs = self._refine(self.context.refine, dense)
        return self.pair.after(outputs)

    def _inside(self, name: str) -> str:
        """Return a name of the model's as it is in the layer."""
        return name.removeprefix(self.prefix)

    def _narrowed(self) -> list[MlpPlan]:
        """Return the MLPs of this layer that are made narrower."""
        return [m for m in self.context.narrow if m.mlp.down.startswith(self.prefix)]

    def _planned(self) -> dict[str, SitePlan]:
        """Return the sites of this layer that are planned, by name."""
        sites = self.context.sites
        return {name: site for name, site in sites.items() if name.startswith(self.prefix)}

    def _steps(self) -> list[Step]:
        """Return the layer's steps in the order they run.

        Projections that share an input are one step, and so is each stack of experts.
        """
        planned = self._planned()
        # A narrower MLP has its turn where its first projection runs.
        narrow = {m.mlp.up[0]: m for m in self._narrowed()}
        names = [*planned, *narrow]
        if not names:
            return []
        slim = self.pair.slim
        stacks = [site for site in planned.values() if site.is_experts]
        with watching(self.context.model, stacks):
            inputs = self.pair.inputs({n: slim.get_submodule(self._inside(n)) for n in names})
        steps: list[Step] = []
        last_input = 0
        for name, x in inputs.items():
            if name in narrow:
                steps.append(narrow[name])
            if name not in planned:
                continue
            last = steps[-1] if steps else None
            joins = isinstance(last, list) and not last[0].is_experts
            if isinstance(last, list) and joins and x.data_ptr() == last_input:
                last.append(planned[name])
            else:
                steps.append([planned[name]])
            last_input = x.data_ptr()
        return steps

    def _moments(
        self, name: str, *, alone: bool = True
    ) -> tuple[Moments, LayerOutputs | None, bool]:
        """Return what a projection is fitted to.

        Args:
            name: the projection's, in the layer.
            alone: whether it shares its input with no other that is fitted.

        Returns:
            Its moments, what is known of the streams after the layer, and whether the projection
            writes to the stream.
        """
        if alone and self.pair.adds_to_stream(self.pair.slim.get_submodule(name)):
            return (*self.pair.writer_moments(name, self._later_writers(name)), True)
        return self.pair.inner_moments(name), None, False

    def _narrow(self, plan: MlpPlan) -> LayerOutputs | None:
        """Keep an MLP's best neurons and refit its down projection."""
        mlp, slim = plan.mlp, self.pair.slim
        name = self._inside(mlp.down)
        down = slim.get_submodule(name)
        # An output that is normalised first, as in Gemma 2, is kept for itself.
        moments, outputs, writes = self._moments(name)
        through = None if writes else wide(dense_weight(down))
        self._note_skipped(mlp.down, moments.fit)
        weight_OM = corrected_weight(moments, dense_weight(down), through)
        chosen = eliminate(weight_OM, moments.fit.gram_II, [plan.width])[plan.width]
        kept = chosen.kept_K
        keep_neurons(self.context.model, mlp, kept, chosen.weight_OK)
        if outputs is not None:
            narrowed = slim.get_submodule(name)
            outputs.module = lambda x: narrowed(x[..., kept])
        if through is not None and self.context.refine is not None:
            self._targets[mlp.down] = through
        whole = chosen.whole(weight_OM.shape[1])
        self.result.errors[mlp.down] = target_error(whole, moments.held_out, through)
        self.context.progress(mlp.down)
        return outputs

    def _fit_experts(self, site: SitePlan) -> None:
        model, seed_of = self.context.model, self.context.seed_of
        fits = True
        if method_named(site.init).needs_gram:
            seen = fit_experts(model, site, partial(self.pair.run_slim, fit=True), seed_of)
            self._note_skipped(site.name, seen)
            self.result.notes += seen.notes(site.name)
        else:
            fits = put_experts(model, site, seed_of) is not None
        self.result.sites.add(site.name)
        if fits:
            self.result.errors[site.name] = self._experts_error(site)
        self.context.progress(site.name)

    def _experts_error(self, site: SitePlan) -> float:
        stack = self.pair.dense.get_parameter(self._inside(site.name)).data
        run = partial(self.pair.run_slim, fit=False)
        return experts_error(self.context.model, site, stack, run)

    def _fit_group(self, group: list[SitePlan]) -> LayerOutputs | None:
        """Fit projections that read one input."""
        model, slim = self.context.model, self.pair.slim
        names = [self._inside(site.name) for site in group]
        moments, outputs, writes = self._moments(names[0], alone=len(group) == 1)
        self._note_skipped(group[0].name, moments.fit)
        mlp = free_neurons(self.context.mlps, group, self.context.sites)
        if mlp is not None:
            groups = group[0].spec["groups"]
            renumber(mlp, model, self.pair, self.prefix, moments, groups)
        for site, name in zip(group, names, strict=True):
            module = slim.get_submodule(name)
            weight_OI = wide(dense_weight(module))
            through = None if writes else self._whole(name, weight_OI)
            bias: Any = getattr(module, "bias", None)
            target = Target(
                corrected_weight(moments, weight_OI, through).to(weight_OI),
                None if bias is None else bias.data,
                self.context.seed_of(site.name),
                moments.fit.gram_II,
            )
            fitted = put_block(model, site, module, target) is not None
            self.result.sites.add(site.name)
            if fitted:
                block: Any = model.get_submodule(site.name)
                if self.context.refine is not None and through is not None:
                    self._targets[site.name] = through
                self.result.errors[site.name] = target_error(
                    block.to_dense().double(), moments.held_out, through
                )
            self.context.progress(site.name)
        if outputs is not None:
            outputs.module = slim.get_submodule(names[0])
        return outputs

    def _whole(self, name: str, weight_OI: Tensor) -> Tensor:
        """Return the weight that reads what the dense layer gives a projection.

        Neurons may be gone by now from what reads them, whose target is what all of them gave.
        """
        dense_OI = wide(dense_weight(self.pair.dense.get_submodule(name)))
        return weight_OI if dense_OI.shape[1] == weight_OI.shape[1] else dense_OI

    def _later_writers(self, name: str) -> list[str]:
        """Return the planned or narrowed writers that run after one, by name in the layer."""
        planned = [other for other, site in self._planned().items() if not site.is_experts]
        planned += [each.mlp.down for each in self._narrowed()]
        names = dict.fromkeys(self._inside(site) for site in planned)
        modules = {other: self.pair.slim.get_submodule(other) for other in (*names, name)}
        order = list(self.pair.inputs(modules))
        after = order[order.index(name) + 1 :]
        return [other for other in after if self.pair.adds_to_stream(modules[other])]

    def _refine(self, spec: Refine, dense: list[Tensor] | None) -> LayerOutputs | None:
        """Descend on the layer's output error, and measure its projections again.

        Args:
            spec: how many steps of what length.
            dense: the dense stream after the layer, where it is known already.
        """
        names = [*self._planned()]
        names += [name for each in self._narrowed() for name in each.sites]
        if not names:
            return None
        inside = list(dict.fromkeys(self._inside(name) for name in names))
        outputs = refine_layer(
            self.context.model,
            self.pair,
            inside,
            spec,
            dense=dense,
            seed=self.context.seed_of(self.prefix),
        )
        for name in inside:
            if self.prefix + name in self.result.errors:
                self.result.errors[self.prefix + name] = self._error_again(name)
        return outputs

    def _error_again(self, name: str) -> float:
        """Return a refined projection's error; its name is the one in the layer."""
        site = self.context.sites.get(self.prefix + name)
        if site is not None and site.is_experts:
            return self._experts_error(site)
        block: Any = self.pair.slim.get_submodule(name)
        weight_OI = dense_weight(block) if site is None else block.to_dense()
        if self.pair.adds_to_stream(block):
            moments, _ = self.pair.writer_moments(name, self._later_writers(name), fit=False)
            through = None
        else:
            moments = self.pair.inner_moments(name, fit=False)
            through = self._targets[self.prefix + name]
        return target_error(weight_OI.double(), moments.held_out, through)

    def _note_skipped(self, name: str, statistics: GramAccumulator | Seen) -> None:
        if statistics.skipped:
            self.result.notes.append(
                f"{name}: {statistics.skipped:,} of {statistics.skipped + statistics.tokens:,} "
                "calibration tokens left out; their activations are not finite."
            )
