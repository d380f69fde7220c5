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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.init import GramAccumulator, Target, damping, learn_outputs, method_named
from llmslim.modeling.modeling_llmslim import other_names, set_module
from llmslim.surgery.blocks import fill_site, put_block, put_experts
from llmslim.surgery.correction import corrected_weight
from llmslim.surgery.expert_fits import Seen, experts_error, fit_experts, watching
from llmslim.surgery.moments import Moments
from llmslim.surgery.neurons import eliminate
from llmslim.surgery.plan import MlpPlan, Plan, SitePlan
from llmslim.surgery.refine import Pair, refine_layer
from llmslim.surgery.sites import (
    Mlp,
    dense_weight,
    find_layers,
    find_mlps,
    find_sites,
    out_features_of,
)
from llmslim.surgery.streams import Calls, fast_type, importance, record_calls, run_layer
from llmslim.surgery.visits import Fitted, Streams, Visits
from llmslim.surgery.width import keep_neurons

_ADDITIVE = 1e-2
"""Largest relative difference at which a projection still counts as added to the stream."""


@dataclass
class _Ahead:
    """What the last step of a layer has worked out already of the streams after it."""

    dense: list[Tensor] = field(default_factory=list)
    """The dense stream after the layer."""
    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """The slim stream without the last projection, and that projection's input."""
    add: Callable[[Tensor], Tensor] | None = None
    """The last projection, as it is now."""


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
        self.fitting = len(windows)
        self.spec = plan.recipe.refine
        self.autocast = fast_type()
        with visits.beginning():
            # One window a batch: every batch has one shape, whatever the number of windows.
            batches = [window[None].to(model.device) for window in torch.cat((windows, held_out))]
            calls: Calls = record_calls(model, list(self.stack), batches)
        self.first, (self.dense, self.slim) = visits.go_on(Streams(calls.hidden, calls.hidden))
        self.extras = calls.extras
        self.result = Fitted()
        self.targets: dict[str, Tensor] = {}
        """Dense weights of the layer's fitted projections, where they are needed once more."""
        self.ahead = _Ahead()
        self.also = other_names(model, set(find_sites(model)))
        self.shared: dict[str, nn.Module] = {}
        """Dense maps that later layers share with finished ones, by the names they have there."""

    def run(self) -> Fitted:
        whole = Fitted()
        prefixes = [f"{self.layers.path}.{index}." for index in range(len(self.stack))]
        planned = [*self.sites, *(mlp.mlp.down for mlp in self.narrow.values())]
        to_fit = [any(name.startswith(prefix) for name in planned) for prefix in prefixes]
        keep = self.plan.keep_layers
        gone = [keep is not None and index not in keep for index in range(len(self.stack))]
        changed = [to_fit[index] or gone[index] for index in range(len(self.stack))]
        last = max((index for index, wanted in enumerate(to_fit) if wanted), default=-1)
        for index in range(self.first, last + 1):
            self.result = Fitted()
            layer = self.stack[index]
            with self.visits.layer(index):
                if gone[index] or not any(changed[: index + 1]):
                    self.dense = [self._run(layer, x, index)[0] for x in self.dense]
                    if not gone[index]:  # until something changes, both streams are one
                        self.slim = self.dense
                else:
                    self._fit_layer(index, layer)
                    self._fill_unseen(prefixes[index])
                after = Streams(self.dense, self.slim)
                self.dense, self.slim = self.visits.finished(index, self.result, after)
            whole.add(self.result)
        return whole

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

    def _fit_layer(self, index: int, layer: nn.Module) -> None:
        prefix = f"{self.layers.path}.{index}."
        dense = self._dense_copy(layer, prefix)
        self.ahead = _Ahead()
        for step in self._steps(index, layer, prefix):
            self.ahead = _Ahead()  # what an earlier step left ready is out of date
            if isinstance(step, MlpPlan):
                self._narrow(index, layer, dense, prefix, step)
            elif isinstance(step, SitePlan):
                self._fit_experts(index, layer, dense, step)
            else:
                self._fit_group(index, layer, dense, prefix, step)
        if self.spec is not None:
            self._refine(index, layer, dense, prefix)
            self.targets.clear()
        ahead = self.ahead
        self.dense = ahead.dense or [self._run(dense, x, index)[0] for x in self.dense]
        if ahead.add is None or not ahead.parts:
            self.slim = [self._run(layer, x, index)[0] for x in self.slim]
        else:
            device = self.slim[0].device.type
            with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
                self.slim = [before + ahead.add(x).float() for before, x in ahead.parts]

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

    def _refine(self, index: int, layer: nn.Module, dense: nn.Module, prefix: str) -> None:
        """Descend on the layer's output error, and measure its writers anew."""
        assert self.spec is not None
        names = [name for name in self.sites if name.startswith(prefix)]
        for mlp in self.narrow.values():
            names += [n for n in (*mlp.mlp.up, mlp.mlp.down) if n.startswith(prefix)]
        names = list(dict.fromkeys(names))
        if not names:
            return
        wanted = self.ahead.dense or [self._run(dense, x, index)[0] for x in self.dense]
        pairs: list[Pair] = [(x, y, importance(y)) for x, y in zip(self.slim, wanted, strict=True)]
        dtype = next(layer.parameters()).dtype
        layer.float()  # small steps would be lost in bfloat16
        refine_layer(
            lambda x: self._run(layer, x, index)[0],
            [p for name in names for p in self.model.get_submodule(name).parameters()],
            pairs[: self.fitting],
            pairs[self.fitting :],
            self.spec,
            seed=self.seed_of(prefix),
        )
        layer.to(dtype)
        for name in names:
            if name in self.result.errors:
                self._measure_again(index, layer, dense, name.removeprefix(prefix), name)
        self.ahead = _Ahead(dense=wanted)

    def _measure_again(
        self, index: int, layer: nn.Module, dense: nn.Module, name: str, full_name: str
    ) -> None:
        site = self.sites.get(full_name)
        if site is not None and site.is_experts:
            self.result.errors[full_name] = self._experts_error(index, layer, dense, site)
            return
        block: Any = layer.get_submodule(name)
        weight_OI = block.to_dense() if full_name in self.sites else dense_weight(block)
        if self._adds_to_stream(index, layer, block):
            statistics = self._writer_statistics(index, layer, dense, name, fit=False)
            through = None
        else:
            statistics = self._inner_statistics(index, layer, dense, name, fit=False)
            through = self.targets[full_name]
        error = _error(weight_OI.double(), statistics.held_out, through)
        self.result.errors[full_name] = error

    def _run(self, layer: nn.Module, x: Tensor, index: int, **kwargs: Any) -> tuple[Any, Any]:
        """Run a layer on a window of one of the streams."""
        both = enumerate(zip(self.dense, self.slim, strict=True))
        window = next(n for n, (dense, slim) in both if x is dense or x is slim)
        return run_layer(layer, x, self.extras[index][window], autocast=self.autocast, **kwargs)

    def _steps(
        self, index: int, layer: nn.Module, prefix: str
    ) -> list[list[SitePlan] | SitePlan | MlpPlan]:
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
            modules = {name: layer.get_submodule(name.removeprefix(prefix)) for name in names}
            _, inputs = self._run(layer, self.slim[0], index, inputs_of=modules)
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

    def _adds_to_stream(self, index: int, layer: nn.Module, site: nn.Module) -> bool:
        """Return whether a projection's output is added to the stream as it is."""
        x = self.slim[0]
        if out_features_of(site) != x.shape[-1]:
            return False
        whole, inputs = self._run(layer, x, index, inputs_of={"site": site})
        without, _ = self._run(layer, x, index, zeroed=[site])
        added = site(inputs["site"].to(next(site.parameters()).dtype)).float()
        return bool((whole - without - added).norm() < _ADDITIVE * added.norm())

    def _narrow(
        self, index: int, layer: nn.Module, dense: nn.Module, prefix: str, plan: MlpPlan
    ) -> None:
        """Keep an MLP's best neurons and refit its down projection."""
        mlp = plan.mlp
        name = mlp.down.removeprefix(prefix)
        down = layer.get_submodule(name)
        # Not where its output is normalised first, as in Gemma 2.
        writes = self._adds_to_stream(index, layer, down)
        if writes:
            statistics, through = self._writer_statistics(index, layer, dense, name), None
        else:
            statistics = self._inner_statistics(index, layer, dense, name)
            through = dense_weight(down).float()
        self._tell_of_skipped(mlp.down, statistics.fit)
        weight_OM = corrected_weight(statistics, dense_weight(down), through)
        chosen = eliminate(weight_OM, statistics.fit.gram_II, [plan.width])[plan.width]
        kept = chosen.kept_K
        keep_neurons(self.model, mlp, kept, chosen.weight_OK)
        whole = chosen.whole(weight_OM.shape[1])
        if writes:
            narrowed = layer.get_submodule(name)
            self.ahead.add = lambda x: narrowed(x[..., kept])
        elif through is not None and self.spec is not None:
            self.targets[mlp.down] = through
        self.result.errors[mlp.down] = _error(whole, statistics.held_out, through)
        self.progress(mlp.down)

    def _fit_experts(self, index: int, layer: nn.Module, dense: nn.Module, site: SitePlan) -> None:
        fits = True
        if method_named(site.init).needs_gram:
            run = lambda: self._run_slim(index, layer, fit=True)  # noqa: E731
            seen = fit_experts(self.model, site, run, self.seed_of)
            self._tell_of_skipped(site.name, seen)
            self.result.notes += seen.notes(site.name)
        else:
            fits = put_experts(self.model, site, self.seed_of) is not None
        self.result.sites.add(site.name)
        if fits:
            self.result.errors[site.name] = self._experts_error(index, layer, dense, site)
        self.progress(site.name)

    def _experts_error(
        self, index: int, layer: nn.Module, dense: nn.Module, site: SitePlan
    ) -> float:
        stack = dense.get_parameter(site.name.removeprefix(f"{self.layers.path}.{index}.")).data
        run = lambda: self._run_slim(index, layer, fit=False)  # noqa: E731
        return experts_error(self.model, site, stack, run)

    def _run_slim(self, index: int, layer: nn.Module, *, fit: bool) -> None:
        """Run a layer over the slim stream's windows to fit on, or to measure on."""
        for x in self.slim[: self.fitting] if fit else self.slim[self.fitting :]:
            self._run(layer, x, index)

    def _fit_group(
        self, index: int, layer: nn.Module, dense: nn.Module, prefix: str, group: list[SitePlan]
    ) -> None:
        names = [site.name.removeprefix(prefix) for site in group]
        modules = [layer.get_submodule(name) for name in names]
        writes = len(group) == 1 and self._adds_to_stream(index, layer, modules[0])
        if writes:
            statistics = self._writer_statistics(index, layer, dense, names[0])
        else:
            statistics = self._inner_statistics(index, layer, dense, names[0])
        self._tell_of_skipped(group[0].name, statistics.fit)
        mlp = self._free_neurons(group)
        if mlp is not None:
            self._reorder(mlp, dense, prefix, modules, statistics, group[0].spec["groups"])
            modules = [layer.get_submodule(name) for name in names]
        if writes:
            self.ahead.add = lambda x: layer.get_submodule(names[0])(x)
        for site, module in zip(group, modules, strict=True):
            weight_OI = dense_weight(module).float()
            through = None if writes else weight_OI
            bias = getattr(module, "bias", None)
            target = Target(
                corrected_weight(statistics, weight_OI, through).float(),
                None if bias is None else bias.data,
                self.seed_of(site.name),
                statistics.fit.gram_II,
            )
            fitted = put_block(self.model, site, module, target) is not None
            self.result.sites.add(site.name)
            if fitted:
                block: Any = self.model.get_submodule(site.name)
                if self.spec is not None and through is not None:
                    self.targets[site.name] = through
                self.result.errors[site.name] = _error(
                    block.to_dense().double(), statistics.held_out, through
                )
            self.progress(site.name)

    def _free_neurons(self, group: list[SitePlan]) -> Mlp | None:
        """Return the MLP whose neurons a group produces, if their order is free and matters."""
        grouped = {site.spec.get("groups") for site in group}
        learned = all(site.spec.get("channel_order") == "learned" for site in group)
        if not learned or len(grouped) != 1:
            return None
        names = {site.name for site in group}
        # What reads the neurons must not care about their order: it learns its own, or has none.
        free = (m for m in self.mlps if set(m.up) == names and not m.fused)
        return next((m for m in free if self._reads_any_order(m.down)), None)

    def _reads_any_order(self, name: str) -> bool:
        site = self.sites.get(name)
        return site is None or site.spec.get("channel_order", "learned") == "learned"

    def _reorder(
        self,
        mlp: Mlp,
        dense: nn.Module,
        prefix: str,
        modules: list[Any],
        statistics: Moments,
        groups: int,
    ) -> None:
        """Renumber an MLP's neurons so that those of a group can do with the same inputs."""
        gram_II = statistics.fit.gram_II
        gram_II = gram_II + damping(gram_II).diag()
        wanted = []
        for module in modules:
            weight_OI = dense_weight(module).float()
            wanted.append(corrected_weight(statistics, weight_OI, weight_OI))
        neurons = learn_outputs(torch.stack(wanted).cpu(), gram_II.cpu(), groups)
        inside = replace(
            mlp,
            up=tuple(name.removeprefix(prefix) for name in mlp.up),
            down=mlp.down.removeprefix(prefix),
        )
        for root, names in ((self.model, mlp), (dense, inside)):
            down = dense_weight(root.get_submodule(names.down))
            keep_neurons(root, names, neurons.to(down.device), down[:, neurons.to(down.device)])

    def _inner_statistics(
        self, index: int, layer: nn.Module, dense: nn.Module, name: str, *, fit: bool = True
    ) -> Moments:
        """Moments of a projection's slim inputs against its dense inputs."""

        def pairs() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
            for slim, full in self._windows(fit):
                x = self._input(layer, slim, index, name)
                yield x, self._input(dense, full, index, name), None

        return self._gather(pairs(), fit)

    def _windows(self, fit: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield both streams window by window, the ones to fit on (if wanted) first."""
        start = 0 if fit else self.fitting
        yield from zip(self.slim[start:], self.dense[start:], strict=True)

    def _writer_statistics(
        self, index: int, layer: nn.Module, dense: nn.Module, name: str, *, fit: bool = True
    ) -> Moments:
        """Moments of a writing projection's slim inputs against what it should add."""
        writer, later = layer.get_submodule(name), self._later_writers(index, layer, name)
        bias: Any = getattr(writer, "bias", None)
        later_dense = [dense.get_submodule(other) for other in later]
        later_slim = [layer.get_submodule(other) for other in later]

        def pairs() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
            for slim, full in self._windows(fit):
                after, _ = self._run(dense, full, index, zeroed=later_dense)
                before, seen = self._run(
                    layer, slim, index, inputs_of={"x": writer}, zeroed=[writer, *later_slim]
                )
                if fit and not later:
                    # Nothing after this projection changes: both streams are nearly there.
                    self.ahead.dense.append(after)
                    self.ahead.parts.append((before, seen["x"]))
                # The block keeps the bias, so it is no part of what the weight has to reach.
                target = after - before if bias is None else after - before - bias.float()
                yield seen["x"], target, importance(after)

        return self._gather(pairs(), fit)

    def _later_writers(self, index: int, layer: nn.Module, name: str) -> list[str]:
        """Return the planned or narrowed writers that run after one, by name in the layer."""
        prefix = f"{self.layers.path}.{index}."
        maps = [other for other, site in self.sites.items() if not site.is_experts]
        planned = [other for other in maps if other.startswith(prefix)]
        planned += [m.mlp.down for m in self.narrow.values() if m.mlp.down.startswith(prefix)]
        names = dict.fromkeys(site.removeprefix(prefix) for site in planned)
        modules = {other: layer.get_submodule(other) for other in names}
        modules[name] = layer.get_submodule(name)
        _, inputs = self._run(layer, self.slim[0], index, inputs_of=modules)
        order = list(inputs)
        after = order[order.index(name) + 1 :]
        return [n for n in after if self._adds_to_stream(index, layer, modules[n])]

    def _tell_of_skipped(self, name: str, statistics: GramAccumulator | Seen) -> None:
        if statistics.skipped:
            self.result.notes.append(
                f"{name}: {statistics.skipped:,} of {statistics.skipped + statistics.tokens:,} "
                "calibration tokens left out; their activations are not finite."
            )

    def _input(self, layer: nn.Module, x: Tensor, index: int, name: str) -> Tensor:
        site = layer.get_submodule(name)
        _, seen = self._run(layer, x, index, inputs_of={"x": site}, stop_after_inputs=True)
        found: Tensor = seen["x"]
        return found

    def _gather(self, pairs: Iterator[tuple[Tensor, Tensor, Tensor | None]], fit: bool) -> Moments:
        statistics: Moments | None = None
        for batch, (x, y, weight) in enumerate(pairs):
            if statistics is None:
                sizes = (x.shape[-1], y.shape[-1])
                statistics = Moments.of(*sizes, device=x.device)
            into = statistics.fit if fit and batch < self.fitting else statistics.held_out
            x, y = x.float(), y.float()
            if weight is not None:
                x, y = x * weight, y * weight
            into.update(x, y)
        assert statistics is not None
        return statistics


def _error(block_OI: Tensor, statistics: GramAccumulator, through: Tensor | None = None) -> float:
    """Return E‖y - B x‖² / E‖y‖² from second moments."""
    cross, power_OO = statistics.cross_OI, statistics.target_OO
    assert cross is not None
    assert power_OO is not None
    if through is not None:
        full = through.double()
        cross, power_OO = full @ cross, full @ power_OO @ full.t()
    power = float(power_OO.diagonal().sum())
    if power <= 0:
        return 0.0
    explained = 2 * (block_OI * cross).sum() - (block_OI @ statistics.gram_II * block_OI).sum()
    return max(0.0, 1 - float(explained) / power)
