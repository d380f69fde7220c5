"""Choose what each projection becomes, by measurement, under one budget.

A rule with `structure: auto` leaves open what its projections become. What they can become is
tried on calibration text, one unit at a time in the dense model; a unit is a whole MLP, or a
projection that belongs to none.

- Its candidates are fitted, and their error is measured on tokens the fit has not seen: an MLP
  with fewer neurons, a projection as each structure that asks for it (`for_auto`; of the built-in
  ones a lower rank, pivoted), in sizes of a sixteenth.
- What the unit means to the model is measured too: the candidate nearest to the budget is put in
  place, and the divergence of the model's predictions from the dense ones is taken on such
  text. Other sizes are taken to cost in proportion to their errors.
- A mixed-integer programme chooses one candidate for each unit, so that the sum of the costs is
  smallest within the budget. Layers that hurt most keep more.

The answer is a recipe without `auto`: it can be read, edited, and used again without measuring.

Left out: how the units' errors act on each other, which only a fit of all would show, and the other
built-in structures. Of those measured alone (docs/benchmarks.md) only a grouped block with a
learned order ever won, at down projections of whole MLPs, where losing neurons is better still.

Shapes: N windows of L tokens, T = tokens, O = out_features, I = in_features, V = vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from llmslim.anatomy.layer_calls import (
    Calls,
    TailModel,
    fast_type,
    importance,
    record_calls,
    run_layer,
    type_taken,
)
from llmslim.anatomy.predictions import divergence, tokens_at_once
from llmslim.anatomy.roles import find_roles
from llmslim.anatomy.sites import (
    dense_weight,
    find_experts,
    find_layers,
    find_mlps,
    find_sites,
)
from llmslim.errors import RecipeError
from llmslim.fitting.calibration import TokenWindows
from llmslim.fitting.moments import Moments
from llmslim.fitting.neurons import eliminate
from llmslim.init import fit_sizes, output_power, wide
from llmslim.modeling.pivoted_low_rank import PivotedLowRank
from llmslim.modeling.sizes import StaysDense, exact_ratio
from llmslim.modeling.structured import StructuredLinear
from llmslim.planning.depth import kept_layers
from llmslim.planning.rules import AUTO, init_of
from llmslim.plugins import STRUCTURES
from llmslim.progress import Progress, quietly
from llmslim.recipe import Recipe, rules_by_name
from llmslim.report.report import WIDTH

_STEPS = 16
"""Sizes to choose from: this many, evenly spaced, the last one dense."""
FIT_TOKENS = 16_384
"""Enough to rank candidates; the fit that follows uses all tokens."""
JUDGED_TOKENS = 8_192
"""That the candidates' errors are measured on, at most."""
PROBE_TOKENS = 2_048
"""Those of them on which predictions are compared."""


@dataclass(frozen=True)
class Candidate:
    """One thing that a unit may become."""

    structure: str | None
    """None leaves it dense."""
    share: float
    """Share of its weights that stays."""
    weights: int
    loss: float
    """Divergence of the model's predictions that it causes, in nats per token."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the structure, as a recipe gives them."""


@dataclass(frozen=True)
class _Unit:
    """Projections that are decided together."""

    rule: int
    layer: int
    ups: tuple[str, ...]
    """Of an MLP: the projections that produce its neurons."""
    name: str
    """The projection whose input is looked at: an MLP's down projection, or the only one."""

    @property
    def sites(self) -> tuple[str, ...]:
        return (*self.ups, self.name)


_Fits = tuple[list[Candidate], Tensor | None]
"""One structure in several sizes, with errors on held-out tokens in the place of losses, and the
dense equivalent of the first one."""


@torch.no_grad()
def allocate(
    model: Any,
    recipe: Recipe,
    calibration: TokenWindows,
    *,
    init: str | None = None,
    progress: Progress | None = None,
) -> Recipe:
    """Replace a recipe's rules with `structure: auto` by what measurement finds best.

    Args:
        model: the dense model; unchanged afterwards.
        recipe: one with a budget.
        calibration: token ids to fit and to measure on.
        init: method that takes the place of the recipe's.
        progress: called with how many units are done, how many there are, and the unit's name.

    Returns:
        The recipe with concrete rules in place of its automatic ones.

    Raises:
        RecipeError: if the budget is below what the candidates can reach.
    """
    assert recipe.budget is not None
    was_training = model.training
    model.eval()
    try:
        rule_of = rules_by_name(recipe, find_roles(model))
        units = _find_units(model, recipe, rule_of)
        measurement = _Measurement(model, units, recipe.budget)
        measurement.record(calibration)
        measured = measurement.run(progress or quietly)
    finally:
        model.train(was_training)
    dense = sum(choices[-1].weights for choices in measured)
    chosen = choose(measured, int(dense * exact_ratio(recipe.budget)))
    if chosen is None:
        least = sum(min(c.weights for c in choices) for choices in measured) / dense
        raise RecipeError(
            f"{recipe.where('budget')}: {recipe.budget:g}; these projections reach {least:.3f} at "
            "the least. Give a larger one."
        )
    experts = {name: rule_of[name] for name in find_experts(model) if name in rule_of}
    return _concrete(recipe, units, chosen, init, experts)


def choose(candidates: Sequence[Sequence[Candidate]], budget: int) -> list[Candidate] | None:
    """Pick one candidate for each unit: the least total loss within a number of weights.

    Returns:
        The picks in order, None where no choice is small enough.
    """
    flat = [c for choices in candidates for c in choices]
    if not flat:
        return []
    one_each = np.zeros((len(candidates), len(flat)))
    start = 0
    for row, choices in enumerate(candidates):
        one_each[row, start : start + len(choices)] = 1
        start += len(choices)
    # In units of the whole, so that the solver's tolerances mean the same for every model.
    loss = np.array([c.loss for c in flat])
    weights = np.array([c.weights for c in flat], dtype=float) / max(budget, 1)
    found = milp(
        loss / max(loss.max(), 1e-30),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(weights[None], -np.inf, 1),
        ],
        options={"mip_rel_gap": 1e-4},
    )
    if found.x is None:
        return None
    return [c for c, taken in zip(flat, found.x, strict=True) if taken > 0.5]


def _find_units(model: Any, recipe: Recipe, matched: Mapping[str, int]) -> list[_Unit]:
    """Return what is to be decided, in the model's order."""
    layers = find_layers(model)
    every = range(layers.count)
    stay = every if recipe.depth is None else kept_layers(recipe, layers.count)
    rule_of = {}
    for name in find_sites(model):
        layer, index = layers.index_of(name), matched.get(name)
        if layer not in stay:
            continue  # what goes with its layer has no share in the budget
        if index is not None and recipe.replace[index].structure == AUTO:
            rule_of[name] = index
    units: dict[str, _Unit] = {}
    for mlp in find_mlps(model, layers):
        rules = {rule_of.get(name) for name in (*mlp.up, mlp.down)}
        if len(rules) == 1 and mlp.down in rule_of:
            layer = layers.index_of(mlp.down)
            assert layer is not None
            unit = _Unit(rule_of[mlp.down], layer, mlp.up, mlp.down)
            units |= dict.fromkeys(unit.sites, unit)
    for name, rule in rule_of.items():
        layer = layers.index_of(name)
        if layer is not None and name not in units:
            units[name] = _Unit(rule, layer, (), name)
    return list(dict.fromkeys(units[name] for name in rule_of if name in units))


class _Measurement:
    """One walk of the dense stream through the model, trying every unit on the way."""

    def __init__(self, model: Any, units: list[_Unit], budget: float) -> None:
        self.model, self.units, self.budget = model, units, budget
        self.structures: list[Any] = [STRUCTURES.get(name) for name in STRUCTURES.names()]
        self.stack: Any = model.get_submodule(find_layers(model).path)

    def record(self, calibration: TokenWindows) -> None:
        """Run the dense model: what its layers are called with, and what it predicts."""
        length = calibration.windows.shape[1]
        fit = calibration.windows[: max(1, FIT_TOKENS // length)]
        # What the candidates are not fitted to comes from all over the text; what the fit that
        # follows will hold out is one stretch of it, a few articles.
        other = torch.cat((calibration.windows[len(fit) :], calibration.held_out))
        judged = other[: max(1, JUDGED_TOKENS // length)]
        self.fitting = len(fit)
        ids = [window[None].to(self.model.device) for window in torch.cat((fit, judged))]
        calls: Calls = record_calls(self.model, list(self.stack), ids)
        fast = fast_type(self.model.device, self.model.dtype)
        self.autocast = type_taken(self.stack[0], calls, fast)
        self.stream, self.extras = calls.hidden, calls.extras
        self.rest = TailModel(self.model, list(self.stack), ids[0], autocast=self.autocast)
        self.probe_ids = ids[self.fitting :][: max(1, PROBE_TOKENS // length)]
        self.dense_logits = [self._logits(0, n).cpu() for n in range(len(self.probe_ids))]

    def run(self, progress: Progress) -> list[list[Candidate]]:
        """Return the candidates of each unit, the dense one last."""
        by_layer: dict[int, list[_Unit]] = defaultdict(list)
        for unit in self.units:
            by_layer[unit.layer].append(unit)
        found: dict[_Unit, list[Candidate]] = {}
        for index, layer in enumerate(self.stack):
            if len(found) == len(self.units):
                break
            here = by_layer[index]
            moments, after = self._walk(index, layer, here)
            for unit in here:
                seen = moments.get(unit.name)  # None where no forward pass calls it: it stays
                fits = self._fits(unit, seen) if seen else ()
                found[unit] = [each for fit in fits for each in self._with_losses(unit, *fit)]
                dense = sum(self._dense(name).numel() for name in unit.sites)
                found[unit].append(Candidate(None, 1.0, dense, 0.0))
                progress(len(found), len(self.units), f"measuring {unit.name}")
            self.stream = after
        return [found[unit] for unit in self.units]

    def _dense(self, name: str) -> Tensor:
        return dense_weight(self.model.get_submodule(name))

    def _walk(
        self, index: int, layer: nn.Module, units: list[_Unit]
    ) -> tuple[dict[str, Moments], list[Tensor]]:
        """Run one layer on every window and gather the moments of its units' inputs."""
        modules = {unit.name: self.model.get_submodule(unit.name) for unit in units}
        weighted = {unit.name for unit in units if unit.ups}
        moments: dict[str, Moments] = {}
        after = []
        for batch, x in enumerate(self.stream):
            output, inputs = run_layer(
                layer, x, self.extras[index][batch], autocast=self.autocast, inputs_of=modules
            )
            assert output is not None
            after.append(output)
            counted: dict[int, Moments] = {}
            for name, seen in inputs.items():
                # Projections that read one tensor share its moments.
                known = counted.get(seen.data_ptr())
                if known is None:
                    known = moments.get(name) or Moments.of(seen.shape[-1], device=seen.device)
                    side = known.fit if batch < self.fitting else known.held_out
                    x_NLI, counts = wide(seen), importance(output)
                    # As in the fit that follows: what an MLP adds counts for what the stream is,
                    # unless that is several side by side.
                    whole = name in weighted and counts.shape[:-1] == x_NLI.shape[:-1]
                    side.update(x_NLI * counts if whole else x_NLI)
                    counted[seen.data_ptr()] = known
                moments[name] = known
        return moments, after

    def _fits(self, unit: _Unit, moments: Moments) -> Iterator[_Fits]:
        """Yield what a unit can become: of an MLP only narrower ones are tried."""
        if unit.ups:
            yield self._narrowed(unit, moments)
        else:
            for cls in self.structures:
                yield self._structured(unit, moments, cls)

    def _narrowed(self, unit: _Unit, moments: Moments) -> _Fits:
        """Fit an MLP with fewer neurons, in every size."""
        weight_OM = wide(self._dense(unit.name))
        gram_MM, held_MM = moments.fit.gram_II, moments.held_out.gram_II
        neurons = weight_OM.shape[1]
        per_neuron = sum(self._dense(name).numel() for name in unit.sites) // neurons
        widths = {share: max(1, int(neurons * share)) for share in self._shares()}
        narrowed = eliminate(weight_OM, gram_MM, widths.values())
        # E‖(W - B) a‖², multiplied out: what is the same for every size is worked out once.
        dense_OM = weight_OM.double()
        cross_OM = dense_OM @ held_MM
        power = float((cross_OM * dense_OM).sum())
        fits = []
        for share, width in widths.items():
            kept_K, weight_OK = narrowed[width]
            explained = 2 * float((cross_OM[:, kept_K] * weight_OK).sum())
            explained -= output_power(weight_OK, held_MM[kept_K][:, kept_K])
            error, options = max(0.0, power - explained), {"keep_ratio": share}
            fits.append(Candidate(WIDTH, share, per_neuron * width, error, options))
        return fits, narrowed[next(iter(widths.values()))].whole(neurons)

    def _structured(self, unit: _Unit, moments: Moments, cls: type[StructuredLinear]) -> _Fits:
        """Fit one projection as a structure, in every size that it offers."""
        weight_OI = self._dense(unit.name)
        out_features, in_features = weight_OI.shape
        tried: list[tuple[float, dict[str, Any], StructuredLinear]] = []
        for share in self._shares():
            options = cls.for_auto(in_features, out_features, share)
            if options is None:
                continue
            try:
                cls.resolve(in_features, out_features, cls.read_options(options))
            except StaysDense:
                continue
            kind: Any = {"device": "meta", "dtype": torch.float64, **options}
            tried.append((share, options, cls(in_features, out_features, **kind)))
        if not tried:
            return [], None
        weight_OI = weight_OI.double()
        fitted = fit_sizes([block for *_, block in tried], weight_OI, moments.fit.gram_II)
        fits: list[Candidate] = []
        probe: Tensor | None = None
        for (share, options, block), block_OI in zip(tried, fitted, strict=True):
            error = output_power(block_OI - weight_OI, moments.held_out.gram_II)
            weights = sum(parameter.numel() for parameter in block.parameters())
            fits.append(Candidate(cls.name, share, weights, error, options))
            probe = block_OI if probe is None else probe
        return fits, probe

    def _shares(self) -> list[float]:
        """Return the sizes to try, the one nearest to the budget first: it is probed."""
        shares = [n / _STEPS for n in range(1, _STEPS)]
        return sorted(shares, key=lambda share: abs(share - self.budget))

    def _with_losses(
        self, unit: _Unit, fits: list[Candidate], probe: Tensor | None
    ) -> list[Candidate]:
        """Return candidates with losses in proportion to their errors."""
        if probe is None:
            return []
        loss = self._divergence(unit.layer, {unit.name: probe})
        per_error = loss / fits[0].loss if fits[0].loss > 0 else 0.0
        return [replace(each, loss=each.loss * per_error) for each in fits]

    def _divergence(self, layer: int, weights: Mapping[str, Tensor]) -> float:
        """Return the mean divergence of predictions with other weights put in place, in nats."""
        total, tokens = 0.0, 0
        with _in_place({self.model.get_submodule(n): w for n, w in weights.items()}):
            for n, dense in enumerate(self.dense_logits):
                apart_T = _divergence(self._logits(layer, n).flatten(0, 1), dense.flatten(0, 1))
                # A token whose hidden state overflows is no measure of the candidate.
                finite_T = apart_T.isfinite()
                total += float(apart_T[finite_T].sum())
                tokens += int(finite_T.sum())
        return total / max(1, tokens)

    def _logits(self, layer: int, n: int) -> Tensor:
        hidden = self.stream[self.fitting + n]
        return self.rest.logits(layer, hidden, self.probe_ids[n])


def _divergence(ours_TV: Tensor, dense_TV: Tensor) -> Tensor:
    """Return how far predictions are from the dense ones, (T,) in nats."""
    found, chunk = [], tokens_at_once(ours_TV)
    for ours, dense in zip(ours_TV.split(chunk), dense_TV.split(chunk), strict=True):
        expected = dense.to(ours.device).float().log_softmax(-1)
        found.append(divergence(expected, ours.float().log_softmax(-1)))
    return torch.cat(found)


@contextmanager
def _in_place(weights: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Give dense maps other weights, temporarily."""
    own = {module: dense_weight(module).clone() for module in weights}
    try:
        for module, weight_OI in weights.items():
            dense_weight(module).copy_(weight_OI)
        yield
    finally:
        for module, weight_OI in own.items():
            dense_weight(module).copy_(weight_OI)


def _concrete(
    recipe: Recipe,
    units: list[_Unit],
    chosen: list[Candidate],
    init: str | None,
    experts: Mapping[str, int],
) -> Recipe:
    """Write the choice as rules: one for all units of a rule that become the same.

    Experts are not measured; each keeps the budget's share.
    """
    alike: dict[tuple[Any, ...], tuple[Candidate, list[str]]] = {}
    for unit, pick in zip(units, chosen, strict=True):
        key = (unit.rule, pick.share, pick.structure or "", repr(pick.options))
        alike.setdefault(key, (pick, []))[1].extend(unit.sites)
    data = recipe.model_dump(mode="json", exclude_unset=True, exclude={"budget", "replace"})
    rules: list[dict[str, Any]] = []
    for index, rule in enumerate(recipe.replace):
        if rule.structure != AUTO:
            rules.append(rule.model_dump(mode="json", exclude_unset=True))
            continue
        method = init_of(recipe, index, init)
        if names := [name for name, rule_index in experts.items() if rule_index == index]:
            same = {"structure": PivotedLowRank.name, "keep_ratio": recipe.budget}
            rules.append({"match": names, **same, "init": method})
        for _, (pick, names) in sorted(item for item in alike.items() if item[0][0] == index):
            if pick.structure is None:
                rules.append({"match": names, "keep": True})
            else:
                fitted = {"structure": pick.structure, **pick.options, "init": method}
                rules.append({"match": names, **fitted})
    return Recipe.of({**data, "replace": rules})
