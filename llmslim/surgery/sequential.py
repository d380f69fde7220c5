"""Fit a plan's blocks layer by layer, each to the inputs it will really see.

Two streams of hidden states walk through the model side by side: the dense model's, and the one of
the model as far as it is slim already. In each decoder layer, in the order the projections run,

- a projection inside the layer is fitted so that its output on the *slim* stream is the dense
  projection's output on the dense stream;
- a projection that writes to the residual stream is fitted to *the dense stream after it minus the
  slim stream before it*: it also repairs what every block before it broke;
- an MLP that is to be narrower keeps the neurons whose loss costs least (see `neurons`), and its
  down projection is refitted to the same residual target.

All three reduce to a weight and a Gram matrix (`corrected_weight`), so every structure and method
works here unchanged. One decoder layer's copy and the two streams are all the memory it takes.

What a token counts for follows the size of the stream, see `importance`.

Shapes: T = tokens, D = hidden size, I = in_features, O = out_features, M = neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.init import GramAccumulator, Target, method_named, wide
from llmslim.modeling.modeling_llmslim import other_names, set_module
from llmslim.surgery.blocks import fill_site, put_block, put_experts
from llmslim.surgery.correction import corrected_weight
from llmslim.surgery.expert_fits import Seen, experts_error, fit_experts, watching
from llmslim.surgery.layer_pair import Ahead, LayerPair
from llmslim.surgery.moments import Moments, target_error
from llmslim.surgery.neurons import eliminate
from llmslim.surgery.plan import MlpPlan, Plan, SitePlan
from llmslim.surgery.predictions import Predictions
from llmslim.surgery.refine_layer import refine_layer
from llmslim.surgery.renumber import free_neurons, renumber
from llmslim.surgery.scrambled import early_layers, scrambled
from llmslim.surgery.sites import dense_weight, find_layers, find_mlps, find_sites
from llmslim.surgery.streams import fast_type, record_calls, together, type_taken
from llmslim.surgery.visits import Fitted, Streams, Visits
from llmslim.surgery.width import keep_neurons


@torch.no_grad()
def fit_sequentially(
    model: Any,
    plan: Plan,
    windows: Tensor,
    held_out: Tensor,
    *,
    seed_of: Callable[[str], int],
    progress: Callable[[str], None],
    visits: Visits | None = None,
) -> Fitted:
    """Put a plan's blocks in place and fit them, in place.

    Args:
        model: the dense model.
        plan: its sites inside decoder layers are fitted; others are left alone.
        windows: token ids to fit on, (N, L).
        held_out: token ids to measure errors on, (M, L).
        seed_of: seed for a site's method.
        progress: told the name of every site once it is done.
        visits: makes layers real and takes them away again; by default they are in memory.
    """
    was_training = model.training
    model.eval()
    kept = visits or Visits()
    try:
        return _Sequential(model, plan, windows, held_out, seed_of, progress, kept).run()
    finally:
        model.train(was_training)


class _Sequential:
    def __init__(
        self,
        model: Any,
        plan: Plan,
        windows: Tensor,
        held_out: Tensor,
        seed_of: Callable[[str], int],
        progress: Callable[[str], None],
        visits: Visits,
    ) -> None:
        self.model, self.plan, self.visits = model, plan, visits
        self.seed_of, self.progress = seed_of, progress
        self.layers = find_layers(model)
        self.stack: Any = model.get_submodule(self.layers.path)
        self.sites = {site.name: site for site in plan.sites}
        self.mlps = find_mlps(model, self.layers)
        self.narrow = {mlp.mlp.name: mlp for mlp in plan.mlps if mlp.fitted}
        self.spec = plan.recipe.refine
        self.early = early_layers(len(self.stack))
        more = windows[:0]
        if any(self._planned(index) for index in range(self.early)):
            more = scrambled(windows, model.config, seed_of("scrambled"))
        with visits.beginning():
            size = together((more, windows, held_out), model.device)
            batches = torch.cat((more, windows, held_out)).to(model.device).split(size)
            self.scrambled = len(more) // size
            self.fitting = self.scrambled + len(windows) // size
            calls = record_calls(model, list(self.stack), batches)
            self.autocast = type_taken(self.stack[0], calls, fast_type(model.device, model.dtype))
            self.predictions = None
            if self.spec is not None and self.spec.logits_steps:
                gone = [index for index in range(len(self.stack)) if self._gone(index)]
                self.predictions = Predictions(
                    model, list(self.stack), calls, batches, gone, self.autocast
                )
        self.extras = calls.extras
        self.first, self.streams = visits.go_on(Streams(calls.hidden, calls.hidden))
        if self.first >= self.early:
            self._leave_scrambled()
        self.result = Fitted()
        self.targets: dict[str, Tensor] = {}
        """Dense weights of the layer's fitted projections, where they are needed once more."""
        self.also = other_names(model, set(find_sites(model)))
        self.shared: dict[str, nn.Module] = {}
        """Dense maps that later layers share with finished ones, by the names they have there."""

    def run(self) -> Fitted:
        whole = Fitted()
        to_fit = [self._planned(index) for index in range(len(self.stack))]
        gone = [self._gone(index) for index in range(len(self.stack))]
        changed = [to_fit[index] or gone[index] for index in range(len(self.stack))]
        last = max((index for index, wanted in enumerate(to_fit) if wanted), default=-1)
        for index in range(self.first, last + 1):
            self.result = Fitted()
            layer = self.stack[index]
            with self.visits.layer(index):
                pair = self._pair(index, layer, layer)
                if gone[index]:
                    after = Streams(pair.outputs(layer), self.streams.slim)
                elif not any(changed[: index + 1]):  # until something changes, both are one
                    both = pair.outputs(layer)
                    after = Streams(both, both)
                else:
                    after = self._fit_layer(index, layer)
                    self._fill_unseen(self._prefix(index))
                if index + 1 == self.early:
                    self._leave_scrambled()
                    after = Streams(*(stream[self.scrambled :] for stream in after))
                self.streams = self.visits.finished(index, self.result, after)
            whole.add(self.result)
        return whole

    def _prefix(self, index: int) -> str:
        return f"{self.layers.path}.{index}."

    def _gone(self, index: int) -> bool:
        """Return whether a layer is taken out."""
        keep = self.plan.keep_layers
        return keep is not None and index not in keep

    def _planned(self, index: int) -> bool:
        """Return whether anything is to be fitted in a layer."""
        planned = [*self.sites, *(mlp.mlp.down for mlp in self.narrow.values())]
        return any(name.startswith(self._prefix(index)) for name in planned)

    def _leave_scrambled(self) -> None:
        """Go on without the scrambled windows, which only the first layers are fitted to."""
        self.extras = [known[self.scrambled :] for known in self.extras]
        self.fitting -= self.scrambled
        if self.predictions is not None:
            self.predictions.leave(self.scrambled)

    def _fill_unseen(self, prefix: str) -> None:
        """Fill what the calibration text never reached from its weights alone."""
        for name, site in self.sites.items():
            if not name.startswith(prefix) or name in self.result.sites:
                continue
            if method_named(site.init).needs_gram:
                self.result.unseen.append(name)
                site = replace(site, init="project")
            self.result.errors[name] = fill_site(self.model, site, self.seed_of)
            self.result.sites.add(name)
            self.progress(name)

    def _pair(self, index: int, dense: nn.Module, slim: nn.Module) -> LayerPair:
        extras = self.extras[index]
        return LayerPair(dense, slim, self.streams, extras, self.fitting, self.autocast)

    def _fit_layer(self, index: int, layer: nn.Module) -> Streams:
        """Fit what is planned in a layer; return the streams after it."""
        prefix = self._prefix(index)
        pair = self._pair(index, self._dense_copy(layer, prefix), layer)
        for step in self._steps(pair, prefix):
            pair.ahead = Ahead()  # what an earlier step left ready is out of date
            if isinstance(step, MlpPlan):
                self._narrow(pair, prefix, step)
            elif isinstance(step, SitePlan):
                self._fit_experts(pair, prefix, step)
            else:
                self._fit_group(pair, prefix, step)
        if self.spec is not None:
            self._refine(pair, index, prefix)
            self.targets.clear()
        return pair.after()

    def _dense_copy(self, layer: nn.Module, prefix: str) -> nn.Module:
        """Return a copy of a layer that stays dense; where it shares maps, they may be slim by now.

        A map that layers share is fitted in the first of them, to what that one gives it.
        """
        dense = copy.deepcopy(layer)
        for name in [name for name in self.shared if name.startswith(prefix)]:
            set_module(dense, name.removeprefix(prefix), self.shared.pop(name))
        for name, others in self.also.items():
            if name.startswith(prefix):
                own = dense.get_submodule(name.removeprefix(prefix))
                self.shared |= dict.fromkeys(others, own)
        return dense

    def _refine(self, pair: LayerPair, index: int, prefix: str) -> None:
        """Descend on the layer's output error, and measure its projections anew."""
        assert self.spec is not None
        names = [name for name in self.sites if name.startswith(prefix)]
        for mlp in self.narrow.values():
            names += [n for n in (*mlp.mlp.up, mlp.mlp.down) if n.startswith(prefix)]
        if not names:
            return
        inside = list(dict.fromkeys(name.removeprefix(prefix) for name in names))
        predicted = None if self.predictions is None else partial(self.predictions.loss, index)
        refine_layer(self.model, pair, inside, self.spec, predicted, self.seed_of(prefix))
        for name in inside:
            if prefix + name in self.result.errors:
                self._measure_again(pair, prefix, prefix + name)

    def _measure_again(self, pair: LayerPair, prefix: str, full_name: str) -> None:
        site, name = self.sites.get(full_name), full_name.removeprefix(prefix)
        if site is not None and site.is_experts:
            self.result.errors[full_name] = self._experts_error(pair, prefix, site)
            return
        block: Any = pair.slim.get_submodule(name)
        weight_OI = dense_weight(block) if site is None else block.to_dense()
        if pair.adds_to_stream(block):
            later, through = self._later_writers(pair, prefix, name), None
            moments = pair.writer_moments(name, later, fit=False)
        else:
            moments, through = pair.inner_moments(name, fit=False), self.targets[full_name]
        self.result.errors[full_name] = target_error(weight_OI.double(), moments.held_out, through)

    def _steps(self, pair: LayerPair, prefix: str) -> list[list[SitePlan] | SitePlan | MlpPlan]:
        """Return what is to be fitted in the order it runs; sites with one input go together.

        Each stack of experts is a step of its own.
        """
        inside = {name: site for name, site in self.sites.items() if name.startswith(prefix)}
        # A narrower MLP has its turn where its first projection runs.
        narrow = {m.mlp.up[0]: m for m in self.narrow.values() if m.mlp.down.startswith(prefix)}
        names = [*inside, *narrow]
        if not names:
            return []
        with watching(self.model, [site for site in inside.values() if site.is_experts]):
            inputs = pair.inputs(
                {name: pair.slim.get_submodule(name.removeprefix(prefix)) for name in names}
            )
        steps: list[list[SitePlan] | SitePlan | MlpPlan] = []
        last_input = 0
        for name, x in inputs.items():
            if name in narrow:
                steps.append(narrow[name])
            if name not in inside:
                continue
            if inside[name].is_experts:
                steps.append(inside[name])
            elif steps and isinstance(steps[-1], list) and x.data_ptr() == last_input:
                steps[-1].append(inside[name])
            else:
                steps.append([inside[name]])
            last_input = x.data_ptr()
        return steps

    def _moments(
        self, pair: LayerPair, prefix: str, name: str, *, alone: bool = True
    ) -> tuple[Moments, bool]:
        """Return what a projection is fitted to, and whether it writes to the stream.

        Args:
            pair: its layer.
            prefix: of the layer's name.
            name: the projection's, in the layer.
            alone: whether it shares its input with no other that is fitted.
        """
        if alone and pair.adds_to_stream(pair.slim.get_submodule(name)):
            return pair.writer_moments(name, self._later_writers(pair, prefix, name)), True
        return pair.inner_moments(name), False

    def _narrow(self, pair: LayerPair, prefix: str, plan: MlpPlan) -> None:
        """Keep an MLP's best neurons and refit its down projection."""
        mlp = plan.mlp
        name = mlp.down.removeprefix(prefix)
        down = pair.slim.get_submodule(name)
        # An output that is normalised first, as in Gemma 2, is kept for itself.
        moments, writes = self._moments(pair, prefix, name)
        through = None if writes else wide(dense_weight(down))
        self._tell_of_skipped(mlp.down, moments.fit)
        weight_OM = corrected_weight(moments, dense_weight(down), through)
        chosen = eliminate(weight_OM, moments.fit.gram_II, [plan.width])[plan.width]
        kept = chosen.kept_K
        keep_neurons(self.model, mlp, kept, chosen.weight_OK)
        whole = chosen.whole(weight_OM.shape[1])
        if through is None:
            narrowed = pair.slim.get_submodule(name)
            pair.ahead.add = lambda x: narrowed(x[..., kept])
        elif self.spec is not None:
            self.targets[mlp.down] = through
        self.result.errors[mlp.down] = target_error(whole, moments.held_out, through)
        self.progress(mlp.down)

    def _fit_experts(self, pair: LayerPair, prefix: str, site: SitePlan) -> None:
        fits = True
        if method_named(site.init).needs_gram:
            run = lambda: pair.run_slim(fit=True)  # noqa: E731
            seen = fit_experts(self.model, site, run, self.seed_of)
            self._tell_of_skipped(site.name, seen)
            self.result.notes += seen.notes(site.name)
        else:
            fits = put_experts(self.model, site, self.seed_of) is not None
        self.result.sites.add(site.name)
        if fits:
            self.result.errors[site.name] = self._experts_error(pair, prefix, site)
        self.progress(site.name)

    def _experts_error(self, pair: LayerPair, prefix: str, site: SitePlan) -> float:
        stack = pair.dense.get_parameter(site.name.removeprefix(prefix)).data
        return experts_error(self.model, site, stack, lambda: pair.run_slim(fit=False))

    def _fit_group(self, pair: LayerPair, prefix: str, group: list[SitePlan]) -> None:
        names = [site.name.removeprefix(prefix) for site in group]
        moments, writes = self._moments(pair, prefix, names[0], alone=len(group) == 1)
        self._tell_of_skipped(group[0].name, moments.fit)
        mlp = free_neurons(self.mlps, group, self.sites)
        if mlp is not None:
            renumber(mlp, self.model, pair, prefix, moments, group[0].spec["groups"])
        if writes:
            layer = pair.slim  # not by way of the pair, see `_refine`
            pair.ahead.add = lambda x: layer.get_submodule(names[0])(x)
        for site, name in zip(group, names, strict=True):
            module = pair.slim.get_submodule(name)
            weight_OI = wide(dense_weight(module))
            through = None if writes else self._whole(pair, name, weight_OI)
            bias: Any = getattr(module, "bias", None)
            target = Target(
                corrected_weight(moments, weight_OI, through).to(weight_OI),
                None if bias is None else bias.data,
                self.seed_of(site.name),
                moments.fit.gram_II,
            )
            fitted = put_block(self.model, site, module, target) is not None
            self.result.sites.add(site.name)
            if fitted:
                block: Any = self.model.get_submodule(site.name)
                if self.spec is not None and through is not None:
                    self.targets[site.name] = through
                self.result.errors[site.name] = target_error(
                    block.to_dense().double(), moments.held_out, through
                )
            self.progress(site.name)

    def _whole(self, pair: LayerPair, name: str, weight_OI: Tensor) -> Tensor:
        """Return the weight that reads what the dense layer gives a projection.

        Neurons may be gone by now from what reads them, whose target is what all of them gave.
        """
        dense_OI = wide(dense_weight(pair.dense.get_submodule(name)))
        return weight_OI if dense_OI.shape[1] == weight_OI.shape[1] else dense_OI

    def _later_writers(self, pair: LayerPair, prefix: str, name: str) -> list[str]:
        """Return the planned or narrowed writers that run after one, by name in the layer."""
        maps = [other for other, site in self.sites.items() if not site.is_experts]
        planned = [other for other in maps if other.startswith(prefix)]
        planned += [m.mlp.down for m in self.narrow.values() if m.mlp.down.startswith(prefix)]
        names = dict.fromkeys(site.removeprefix(prefix) for site in planned)
        modules = {other: pair.slim.get_submodule(other) for other in (*names, name)}
        order = list(pair.inputs(modules))
        after = order[order.index(name) + 1 :]
        return [other for other in after if pair.adds_to_stream(modules[other])]

    def _tell_of_skipped(self, name: str, statistics: GramAccumulator | Seen) -> None:
        if statistics.skipped:
            self.result.notes.append(
                f"{name}: {statistics.skipped:,} of {statistics.skipped + statistics.tokens:,} "
                "calibration tokens left out; their activations are not finite."
            )
