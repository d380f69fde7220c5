"""Work out what a recipe makes of a model, before anything is touched.

`plan` reads names and shapes only, so a model on the meta device, built from config.json alone,
will do. Every problem is found before any is raised, and every parameter of the model ends in
exactly one row of the ledger.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from llmslim.errors import SizeError, SlimError, TargetError, raise_together
from llmslim.init import method_named
from llmslim.modeling.pivoted_low_rank import PivotedLowRank
from llmslim.modeling.sizes import StaysDense, exact_ratio
from llmslim.modeling.structured import StructuredLinear, structure_class
from llmslim.recipe import Recipe, Rule, first_rule
from llmslim.surgery.depth import depth_changes, kept_layers
from llmslim.surgery.report import Kind, Report, Row
from llmslim.surgery.rules import AUTO, WIDTH, check_rules, init_of, method_exists
from llmslim.surgery.sites import Layers, Mlp, Site, find_layers, find_mlps, find_sites
from llmslim.surgery.width import width_field


@dataclass(frozen=True)
class SitePlan:
    """One dense map and the block that takes its place."""

    name: str
    """Name in the source model."""
    new_name: str
    """Name once layers have moved."""
    spec: dict[str, Any]
    """What `build` needs."""
    init: str
    """Name of the method that fills it."""


@dataclass(frozen=True)
class MlpPlan:
    """One MLP and the number of neurons it is to have."""

    mlp: Mlp
    width: int
    init: str
    """Name of the method that chooses and refits."""

    @property
    def fitted(self) -> bool:
        """Whether neurons are chosen, and the down projection refitted, by calibration data."""
        return self.width < self.mlp.width and method_named(self.init).needs_gram


@dataclass(frozen=True)
class Plan:
    """Everything a recipe does to one model; made by `plan`, carried out by `rewrite`."""

    model: str
    recipe: Recipe
    rows: tuple[Row, ...]
    sites: tuple[SitePlan, ...] = ()
    """Blocks to build, in the model's order."""
    layers: Layers | None = None
    keep_layers: tuple[int, ...] | None = None
    """Decoder layers that stay; None leaves the depth alone."""
    mlps: tuple[MlpPlan, ...] = ()
    """MLPs that change their width."""
    resized: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Specs of resized projections that the config alone cannot express, by new name."""
    text_config: dict[str, Any] = field(default_factory=dict)
    """Fields of the text config that change."""
    notes: tuple[str, ...] = ()
    """What a reader of the report must know."""
    config: Any = None
    """The model's config, as it is before."""

    @property
    def needs_calibration(self) -> bool:
        """Whether any method of the plan works on calibration data alone."""
        return any(method_named(site.init).needs_gram for site in self.sites) or any(
            mlp.fitted for mlp in self.mlps
        )

    def report(self) -> Report:
        """Return the ledger, as it will be once the plan is carried out."""
        return Report(self.model, self.recipe.name, self.rows, self.notes)

    def new_name(self, name: str) -> str:
        """Return what a module of the source model is called afterwards."""
        if self.layers is None or self.keep_layers is None:
            return name
        places = {old: new for new, old in enumerate(self.keep_layers)}
        return self.layers.renamed(name, places)


def model_on_meta(config: Any) -> nn.Module:
    """Build a causal language model from its config without memory for its weights."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return model


def plan(model: Any, recipe: Recipe, *, model_name: str = "", init: str | None = None) -> Plan:
    """Work out what `recipe` makes of `model`; touches nothing.

    Args:
        model: a transformers causal language model (on any device, meta too) or its config.
        recipe: what to do.
        model_name: how reports call the model; its class name by default.
        init: name of a method that takes the place of the recipe's own.

    Raises:
        SlimError: with every problem found: rules that match nothing, sizes that do not fit,
            layers that are not there. Its class is that of the first.
    """
    if not isinstance(model, nn.Module):
        model = model_on_meta(model)
    return _Planner(model, recipe, model_name or type(model).__name__, init).plan()


class _Planner:
    """Gathers rows and problems over one walk through the model."""

    def __init__(self, model: Any, recipe: Recipe, name: str, init: str | None) -> None:
        self.model, self.recipe, self.name, self.init = model, recipe, name, init
        self.errors: list[SlimError] = []
        self.notes: list[str] = []
        self.sites = find_sites(model)
        self.sizes = {
            site.name: (site.in_features, site.out_features) for site in self.sites.values()
        }
        self.layers: Layers | None = None
        self._decoder = _layers_or_none(model)
        self.keep: tuple[int, ...] | None = None
        self.mlps: list[MlpPlan] = []
        self.changes: dict[str, Any] = {}
        self.planned: list[SitePlan] = []
        self.resized: dict[str, dict[str, Any]] = {}
        # One sentence per rule and cause, with every site it concerns.
        self.wrong: dict[tuple[int, str], list[str]] = defaultdict(list)

    def plan(self) -> Plan:
        recipe = self.recipe
        for step in (self._plan_depth, self._plan_width):
            try:
                step()
            except SlimError as error:
                self.errors.append(error)
        told = check_rules(recipe, list(self.sites), type(self.model).__name__, self.init)
        self.errors += told.errors
        self.notes += told.notes
        if recipe.has_auto:
            self.notes.append(
                "structure auto: every layer is shown with the same share; which keeps how much is "
                "measured on calibration text first."
            )
        rows = tuple(self._rows())
        for (index, cause), names in self.wrong.items():
            where = recipe.where("replace", index, *self._guilty_option(index, cause))
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.errors.append(SizeError(f"{where}: {names[0]}{more}: {cause}."))
        raise_together(self.errors)
        draft = Plan(self.name, recipe, rows, layers=self.layers, keep_layers=self.keep)
        return replace(
            draft,
            sites=tuple(replace(site, new_name=draft.new_name(site.name)) for site in self.planned),
            mlps=tuple(self.mlps),
            resized={draft.new_name(name): spec for name, spec in self.resized.items()},
            text_config=self.changes,
            notes=tuple(self.notes),
            config=self.model.config,
        )

    def _plan_depth(self) -> None:
        if self.recipe.depth is None:
            return
        self.layers = find_layers(self.model)
        self.keep = kept_layers(self.recipe, self.layers.count)
        config = self.model.config.get_text_config()
        self.changes |= depth_changes(config, self.keep, self.layers.count)

    def _plan_width(self) -> None:
        """Note every MLP that changes its width, by the section `width` or by a rule."""
        rules = self.recipe.replace
        if self.recipe.width is None and not any(_narrows(rule) for rule in rules):
            return
        layers = self.layers or find_layers(self.model)
        found = [mlp for mlp in find_mlps(self.model, layers) if self._stays(mlp.name, layers)]
        wanted = self._wanted_widths(found)
        self.mlps = [plan for plan in wanted if plan.width != plan.mlp.width]
        for plan in self.mlps:
            self._check_alone(plan.mlp)
            hidden = self.sizes[plan.mlp.down][1]
            self.sizes[plan.mlp.down] = (plan.width, hidden)
            for up in plan.mlp.up:
                self.sizes[up] = (hidden, plan.width * (2 if plan.mlp.fused else 1))
        if not self.mlps:
            return
        uniform = len(wanted) == len(found) and len({plan.width for plan in wanted}) == 1
        width = self.mlps[0].width
        change = width_field(self.model.config, width, model_on_meta) if uniform else None
        if change is not None:
            self.changes |= change
            return
        for plan in self.mlps:
            for name in (*plan.mlp.up, plan.mlp.down):
                self.resized[name] = self._linear_spec(name)

    def _wanted_widths(self, mlps: list[Mlp]) -> list[MlpPlan]:
        """Return every MLP that is given a width, with it.

        Raises:
            TargetError: if the section `width` finds no MLP.
        """
        recipe, planned = self.recipe, []
        if recipe.width is not None and not mlps:
            raise TargetError(
                f"{recipe.where('width', 'intermediate_size')}: no MLP found in "
                f"{type(self.model).__name__} whose sizes fit each other. Leave `width` out."
            )
        for mlp in mlps:
            index = first_rule(recipe, mlp.down)
            rule = None if index is None else recipe.replace[index]
            if rule is None or index is None or not _narrows(rule):
                if recipe.width is not None:
                    width, init = recipe.width.intermediate_size, self.init or recipe.init
                    planned.append(MlpPlan(mlp, width, init))
            elif recipe.width is not None:
                self.wrong[index, "the section `width` sets the width already"].append(mlp.down)
            elif {first_rule(recipe, up) for up in mlp.up} != {index}:
                if rule.structure != AUTO:
                    cause = f"the rule must match all of {', '.join((*mlp.up, mlp.down))}"
                    self.wrong[index, cause].append(mlp.down)
            elif share := _share_of_neurons(recipe, rule):
                width = max(1, int(mlp.width * exact_ratio(share)))
                planned.append(MlpPlan(mlp, width, init_of(recipe, index, self.init)))
        return planned

    def _check_alone(self, mlp: Mlp) -> None:
        """Refuse an MLP with per-neuron parameters outside its projections (an inner norm).

        Raises:
            TargetError: if it has any.
        """
        known = {*mlp.up, mlp.down}
        parent = self.model.get_submodule(mlp.name)
        if isinstance(parent, nn.Module) and len(list(parent.children())) > len(known) + 4:
            return  # the projections stand directly in the decoder layer, among attention
        for name, parameter in parent.named_parameters():
            owner = f"{mlp.name}.{name}".rpartition(".")[0]
            if owner not in known and mlp.width in parameter.shape:
                raise TargetError(
                    f"{self.recipe.where('width', 'intermediate_size')}: {owner} has one parameter "
                    "for each neuron too, which cannot be resized. Leave `width` out."
                )

    def _linear_spec(self, name: str) -> dict[str, Any]:
        in_features, out_features = self.sizes[name]
        return {
            "structure": "linear",
            "in_features": in_features,
            "out_features": out_features,
            "bias": self.sites[name].bias,
        }

    def _rows(self) -> list[Row]:
        owners: dict[int, str] = {}
        head = self.model.get_output_embeddings()
        rows = []
        for name, module in self.model.named_modules():
            parameters = [p for p in module._parameters.values() if p is not None]
            if not parameters:
                continue
            own = [p for p in parameters if id(p) not in owners]
            tied_to = next((owners[id(p)] for p in parameters if id(p) in owners), "")
            for parameter in own:
                owners[id(parameter)] = name
            kind = self._kind(name, module, head)
            row = Row(
                name=name or "(model)",
                kind=kind,
                action="kept",
                params_before=sum(p.numel() for p in own),
                bytes_before=sum(p.numel() * p.element_size() for p in own),
                flops_per_token_before=self._flops(name, module),
            )
            site = self.sites.get(name)
            if site:
                row = replace(row, in_features=site.in_features, out_features=site.out_features)
            row = replace(
                row,
                params_after=row.params_before,
                bytes_after=row.bytes_before,
                flops_per_token_after=row.flops_per_token_before,
            )
            rows.append(self._decide(row, site, own[0] if own else None, tied_to))
        return rows

    def _kind(self, name: str, module: nn.Module, head: nn.Module | None) -> Kind:
        if module is head:
            return "head"
        if isinstance(module, nn.Embedding):
            return "embedding"
        dense = name in self.sites or isinstance(module, StructuredLinear)
        return "projection" if dense else "other"

    def _flops(self, name: str, module: nn.Module) -> int:
        """Return two per weight of a dense map or block; a tied head multiplies all the same."""
        if name not in self.sites and not isinstance(module, StructuredLinear):
            return 0
        weights = [p for key, p in module._parameters.items() if p is not None and key != "bias"]
        return 2 * sum(p.numel() for p in weights)

    def _decide(
        self, row: Row, site: Site | None, parameter: nn.Parameter | None, tied_to: str
    ) -> Row:
        """Return the row with its action, its reason and what is left of it."""
        if self.layers and self.keep is not None:
            index = self.layers.index_of(row.name)
            if index is not None and index not in self.keep:
                return _emptied(row, "dropped", f"decoder layer {index} is dropped")
        if tied_to and parameter is None:
            return replace(row, action="tied", reason=f"shares its parameters with {tied_to}")
        if site is None:
            what = {"embedding": "an embedding", "projection": "a block already"}
            return replace(row, reason=f"{what.get(row.kind, 'not a projection')}")
        assert parameter is not None
        row = self._resize(row, parameter)
        index = first_rule(self.recipe, site.name)
        if index is None:
            reason = row.reason or "no rule matches"
            return replace(row, action="unmatched", reason=reason)
        rule = self.recipe.replace[index]
        if rule.keep:
            return replace(row, reason=row.reason or f"replace[{index}] keeps it")
        return self._replace(row, site, parameter, index)

    def _resize(self, row: Row, parameter: nn.Parameter) -> Row:
        sizes = self.sizes[row.name]
        if sizes == (row.in_features, row.out_features):
            return row
        bias = sizes[1] if self.sites[row.name].bias else 0
        return self._with_weights(
            row, sizes[0] * sizes[1], bias, parameter, reason=f"resized to {sizes[1]}x{sizes[0]}"
        )

    def _replace(self, row: Row, site: Site, parameter: nn.Parameter, index: int) -> Row:
        rule = self.recipe.replace[index]
        structure, options = rule.structure, rule.options()
        assert structure is not None
        narrower = any(site.name in (*plan.mlp.up, plan.mlp.down) for plan in self.mlps)
        if structure == WIDTH or (structure == AUTO and narrower):
            return self._narrowed(row, site, index)
        if structure == AUTO:
            structure, options = PivotedLowRank.name, {"keep_ratio": self.recipe.budget}
        if rule.neurons is not None and not narrower and rule.neurons < 1:
            self.wrong[index, "neurons is for the projections of an MLP"].append(site.name)
            return row
        if rule.neurons is not None and rule.keep_ratio is not None:
            if rule.keep_ratio > rule.neurons:
                cause = "keep_ratio is of the original weights, so at most what neurons leaves"
                self.wrong[index, cause].append(site.name)
                return row
            rest = exact_ratio(rule.keep_ratio) / exact_ratio(rule.neurons)
            options["keep_ratio"] = float(rest)
        try:
            cls = structure_class(structure)
        except ValueError:
            return row  # told once by check_rules
        if not issubclass(cls, StructuredLinear):
            return row
        options = {key: value for key, value in options.items() if key in cls.option_names}
        in_features, out_features = self.sizes[site.name]
        try:
            resolved = cls.resolve(in_features, out_features, **options)
        except StaysDense as reason:
            kept = f"stays dense: {reason}"
            return replace(row, reason=f"{row.reason}; {kept}" if row.reason else kept)
        except ValueError as error:
            self.wrong[index, str(error)].append(site.name)
            return row
        init = init_of(self.recipe, index, self.init)
        if resolved.get("activation") and not init.startswith("random"):
            self.wrong[index, f"init {init} needs a linear block; use random"].append(site.name)
        in_layer = self._decoder is not None and self._decoder.index_of(site.name) is not None
        if method_exists(init) and method_named(init).needs_gram and not in_layer:
            cause = f"init {init} works inside decoder layers; give this projection init: project"
            self.wrong[index, cause].append(site.name)
        spec = {
            "structure": structure,
            "in_features": in_features,
            "out_features": out_features,
            "bias": site.bias,
            **resolved,
        }
        self.planned.append(SitePlan(site.name, site.name, spec, init))
        self.resized.pop(site.name, None)
        weights = cls.count_weights(in_features, out_features, **resolved)
        row = self._with_weights(row, weights, out_features if site.bias else 0, parameter)
        return replace(row, action="replaced", structure=structure, options=resolved)

    def _narrowed(self, row: Row, site: Site, index: int) -> Row:
        """Return the row of a projection whose MLP gets fewer neurons."""
        plan = next((p for p in self.mlps if site.name in (*p.mlp.up, p.mlp.down)), None)
        if plan is None:
            if self.recipe.replace[index].keep_ratio is None:
                cause = "structure width takes keep_ratio, the share of neurons to keep"
            elif self.recipe.replace[index].keep_ratio == 1:
                return row
            else:
                cause = "structure width is for the projections of an MLP"
            self.wrong[index, cause].append(site.name)
            return row
        return replace(
            row, action="replaced", structure=WIDTH, options={"neurons": plan.width}, reason=""
        )

    def _with_weights(
        self, row: Row, weights: int, bias: int, parameter: nn.Parameter, reason: str = ""
    ) -> Row:
        return replace(
            row,
            reason=reason or row.reason,
            params_after=weights + bias,
            bytes_after=(weights + bias) * parameter.element_size(),
            flops_per_token_after=2 * weights,
        )

    def _stays(self, name: str, layers: Layers) -> bool:
        return self.keep is None or layers.index_of(name) in self.keep

    def _guilty_option(self, index: int, cause: str) -> tuple[str, ...]:
        """Return the rule's key that a sentence about sizes starts with, if any."""
        rule = self.recipe.replace[index]
        first = cause.partition(" ")[0]
        return (first,) if first in (*rule.options(), "init") else ()


def _narrows(rule: Rule) -> bool:
    """Return whether a rule changes the number of neurons of the MLPs it matches."""
    return rule.structure in (WIDTH, AUTO) or rule.neurons is not None


def _share_of_neurons(recipe: Recipe, rule: Rule) -> float | None:
    if rule.structure == AUTO:
        return recipe.budget
    return rule.keep_ratio if rule.structure == WIDTH else rule.neurons


def _layers_or_none(model: Any) -> Layers | None:
    try:
        return find_layers(model)
    except TargetError:
        return None


def _emptied(row: Row, action: Any, reason: str) -> Row:
    return replace(
        row,
        action=action,
        reason=reason,
        params_after=0,
        bytes_after=0,
        flops_per_token_after=0,
    )
