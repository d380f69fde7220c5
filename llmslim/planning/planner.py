"""Work out what a recipe makes of a model, before anything is touched.

`plan` reads names and shapes only, so a model on the meta device, built from config.json alone,
will do. Every problem is found before any is raised, and every parameter of the model ends in
exactly one row of the ledger.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llmslim.anatomy.roles import find_roles
from llmslim.anatomy.sites import (
    Layers,
    Site,
    find_experts,
    find_fixed,
    find_layers,
    find_sites,
)
from llmslim.editing.finalise import check_described
from llmslim.editing.plans import DepthPlan, Plan, SitePlan
from llmslim.errors import SizeError, SlimError, TargetError, and_more, raise_together
from llmslim.init import method_named, method_names
from llmslim.modeling.base_class import auto_class_of
from llmslim.modeling.experts import Experts
from llmslim.modeling.modeling_llmslim import other_names
from llmslim.modeling.pivoted_low_rank import PivotedLowRank
from llmslim.modeling.sizes import OptionError, StaysDense, exact_ratio
from llmslim.modeling.structured import StructuredLinear, option_values, structure_class
from llmslim.planning.depth import check_independent, kept_layers, plan_depth
from llmslim.planning.quantisers import unquantised
from llmslim.planning.rules import AUTO, check_rules, init_of
from llmslim.planning.widths import Widths, narrows, plan_widths
from llmslim.recipe import Recipe, rules_by_name
from llmslim.report.ledger import Entry, active_experts, entries
from llmslim.report.report import WIDTH, Row


def model_on_meta(config: Any) -> nn.Module:
    """Build a language model from its config without memory for its weights."""
    with torch.device("meta"):
        model: nn.Module = auto_class_of(config).from_config(copy.deepcopy(config))
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
        self.sites = find_sites(model) | find_experts(model)
        self.roles = find_roles(model)
        self.rule_of = rules_by_name(recipe, self.roles)
        self.layers: Layers | None = None
        self._decoder = _layers_or_none(model)
        self.keep: tuple[int, ...] | None = None
        self.depth: DepthPlan | None = None
        self.changes: dict[str, Any] = {}
        self.widths = Widths()
        self.planned: list[SitePlan] = []
        # One sentence per rule, key and cause, with every site it concerns.
        self.wrong: dict[tuple[int, str, str], list[str]] = defaultdict(list)

    def plan(self) -> Plan:
        recipe = self.recipe
        for step in (self._plan_depth, self._plan_width):
            try:
                step()
            except SlimError as error:
                self.errors.append(error)
        checked = check_rules(recipe, self.roles, type(self.model).__name__, self.init)
        self.errors += checked.errors
        self.notes += checked.notes
        if recipe.has_auto:
            self.notes.append(
                "structure auto: every layer is shown with the same share; which keeps how much is "
                "measured on calibration text first."
            )
        rows = tuple(self._rows())
        for (index, key, cause), names in self.wrong.items():
            where = recipe.where("replace", index, *([key] if key else []))
            self.errors.append(SizeError(f"{where}: {and_more(names)}: {cause}."))
        raise_together(self.errors)
        self.notes += self._without_effect(rows)
        self.notes += unquantised(self.planned)
        draft = Plan(self.name, recipe, rows, layers=self.layers, keep_layers=self.keep)
        also = other_names(self.model, {site.name for site in self.planned})
        plan = replace(
            draft,
            sites=tuple(
                replace(
                    site,
                    new_name=draft.new_name(site.name),
                    also=tuple(also.get(site.name, ())),
                )
                for site in self.planned
            ),
            mlps=tuple(self.widths.mlps),
            resized={draft.new_name(name): spec for name, spec in self.widths.resized.items()},
            text_config=self.changes,
            depth=self.depth,
            notes=tuple(dict.fromkeys(self.notes)),
            config=self.model.config,
        )
        check_described(self.model, plan)
        return plan

    def _plan_depth(self) -> None:
        if self.recipe.depth is None:
            return
        self.layers = find_layers(self.model)
        self.keep = kept_layers(self.recipe, self.layers.count)
        check_independent(self.model, self.layers, self.keep)
        self.depth = plan_depth(self.model, self.layers, self.keep)
        self.changes |= self.depth.fields
        self.notes += self.depth.notes

    def _plan_width(self) -> None:
        if self.recipe.width is None and not any(narrows(rule) for rule in self.recipe.replace):
            return
        self.widths = plan_widths(
            self.model,
            self.recipe,
            self.layers or find_layers(self.model),
            rule_of=self.rule_of,
            sites=self.sites,
            stays=lambda index: self.keep is None or index in self.keep,
            init=self.init,
        )
        self.changes |= self.widths.changes
        for index, error, name in self.widths.problems:
            self._refuse(index, error, name)

    def _refuse(self, index: int, error: ValueError, name: str) -> None:
        """Note what is wrong with a rule for one site; only some errors know the option's key."""
        self.wrong[index, getattr(error, "key", ""), str(error)].append(name)

    def _rows(self) -> Iterator[Row]:
        flops: dict[str, int] = {}
        for entry in entries(self.model, self.sites, find_fixed(self.model)):
            row = self._decide(entry)
            if row.action == "tied" and entry.site is None:
                row = replace(row, flops_per_token_after=flops[entry.tied_to])
            flops[row.name] = row.flops_per_token_after
            yield row

    def _decide(self, entry: Entry) -> Row:
        """Return the row with its action, its reason and what is left of it."""
        row = replace(entry.row, role=self.roles.get(entry.row.name, ""))
        entry = replace(entry, row=row)
        if self.layers and self.keep is not None:
            index = self.layers.index_of(row.name)
            if index is not None and index not in self.keep:
                return _emptied(row, "dropped", f"decoder layer {index} is dropped")
        if entry.tied_to and not entry.element_size:
            return replace(row, action="tied", reason=f"shares its parameters with {entry.tied_to}")
        if entry.site is None:
            return row
        row = self._resize(entry)
        index = self.rule_of.get(row.name)
        if index is None:
            return replace(row, action="unmatched", reason=row.reason or "no rule matches")
        rule = self.recipe.replace[index]
        if rule.keep:
            return replace(row, reason=row.reason or f"replace[{index}] keeps it")
        try:
            return self._replace(replace(entry, row=row), entry.site, index)
        except StaysDense as reason:
            kept = f"stays dense: {reason}"
            return replace(row, reason=f"{row.reason}; {kept}" if row.reason else kept)
        except ValueError as error:  # an OptionError, or what a plug-in raises
            self._refuse(index, error, row.name)
            return row

    def _without_effect(self, rows: Sequence[Row]) -> Iterator[str]:
        """Yield a sentence for every rule that replaces nothing of what it matches."""
        met: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            index = self.rule_of.get(row.name)
            if index is not None and not self.recipe.replace[index].keep:
                met[index].append(row)
        for index, matched in sorted(met.items()):
            if not any(row.action == "replaced" for row in matched):
                names = and_more([row.name for row in matched])
                yield (
                    f"{self.recipe.where('replace', index)}: replaces nothing; {names}: "
                    f"{matched[0].reason or 'stays as it is'}."
                )

    def _sizes(self, site: Site) -> tuple[int, int]:
        """Return a site's sizes once MLPs have their new widths."""
        return self.widths.sizes.get(site.name, (site.in_features, site.out_features))

    def _resize(self, entry: Entry) -> Row:
        row, site = entry.row, entry.site
        assert site is not None
        sizes = self._sizes(site)
        if sizes == (row.in_features, row.out_features):
            return row
        reason = f"resized to {sizes[1]}x{sizes[0]}"
        return replace(self._with_weights(entry, site, sizes[0] * sizes[1]), reason=reason)

    def _replace(self, entry: Entry, site: Site, index: int) -> Row:
        """Plan the block that takes a site's place, and return its row.

        Raises:
            StaysDense: if nothing would be gained.
            ValueError: if the rule is wrong for the site.
        """
        row, rule = entry.row, self.recipe.replace[index]
        narrower = any(site.name in plan.sites for plan in self.widths.mlps)
        if rule.structure == WIDTH or (rule.structure == AUTO and narrower):
            return self._narrowed(row, site, index)
        cls, options = self._block(site, row.role, index, narrower=narrower)
        in_features, out_features = sizes = self._sizes(site)
        explicit = cls.resolve(*sizes, cls.read_options(options))
        weights = cls.count_weights(*sizes, explicit)
        init = self._method(site, index, linear=cls.is_linear(explicit))
        resolved = option_values(explicit)
        spec = {
            "structure": cls.name,
            "in_features": in_features,
            "out_features": out_features,
            "bias": site.bias,
            **resolved,
        }
        self.planned.append(SitePlan(site.name, site.name, _stacked(spec, site), init))
        self.widths.resized.pop(site.name, None)
        row = self._with_weights(entry, site, weights)
        if site.experts:
            resolved = {"experts": site.experts, **resolved}
        return replace(row, action="replaced", structure=cls.name, options=resolved)

    def _block(
        self, site: Site, role: str, index: int, *, narrower: bool
    ) -> tuple[type[StructuredLinear], dict[str, Any]]:
        """Return the structure that a rule names, and its options for a site.

        Raises:
            OptionError: if the share of the neurons does not go with them.
        """
        rule = self.recipe.replace[index]
        if rule.structure == AUTO:
            return PivotedLowRank, {"keep_ratio": self.recipe.budget}
        cls: Any = structure_class(str(rule.structure))
        options = rule.options()
        if rule.neurons is not None and not narrower and rule.neurons < 1:
            raise OptionError("neurons", f"neurons is for {_an_mlp(site, role)}")
        keep_ratio = options.get("keep_ratio")
        if rule.neurons is not None and keep_ratio is not None:
            if keep_ratio > rule.neurons:
                cause = "keep_ratio is of the original weights, so at most what neurons leaves"
                raise OptionError("keep_ratio", cause)
            options["keep_ratio"] = float(exact_ratio(keep_ratio) / exact_ratio(rule.neurons))
        return cls, options

    def _method(self, site: Site, index: int, *, linear: bool) -> str:
        """Return the name of the method that fills a site's block.

        Raises:
            OptionError: if it cannot fill this one.
        """
        init = init_of(self.recipe, index, self.init)
        if init not in method_names():
            return init  # `check_rules` has found that
        method = method_named(init)
        if method.fits and not linear:
            raise OptionError("init", f"init {init} needs a linear block; use random")
        inside = self._decoder is not None and self._decoder.index_of(site.name) is not None
        if method.needs_gram and not inside:
            raise OptionError(
                "init",
                f"init {init} works inside decoder layers; give this projection init: project",
            )
        return init

    def _narrowed(self, row: Row, site: Site, index: int) -> Row:
        """Return the row of a projection whose MLP gets fewer neurons.

        Raises:
            OptionError: if it is part of no such MLP.
        """
        plan = next((plan for plan in self.widths.mlps if site.name in plan.sites), None)
        if plan is not None:
            options = {"neurons": plan.width}
            return replace(row, action="replaced", structure=WIDTH, options=options, reason="")
        if self.recipe.replace[index].options()["keep_ratio"] == 1:
            return row
        raise OptionError("structure", f"structure width is for {_an_mlp(site, row.role)}")

    def _with_weights(self, entry: Entry, site: Site, weights: int) -> Row:
        """Return the row with another number of weights, for each expert where it has some."""
        bias = self._sizes(site)[1] if site.bias else 0
        count = weights * max(1, site.experts) + bias
        return replace(
            entry.row,
            params_after=count,
            bytes_after=count * entry.element_size,
            flops_per_token_after=2 * weights * active_experts(self.model.config, site),
        )


def _an_mlp(site: Site, role: str) -> str:
    more = ""
    if site.experts:
        more = "; experts take any other structure"
    elif role:
        # An inner norm, adapters, a projection that is not called, or beside a wider MLP.
        more = f"; this one ({role}) is not part of one whose neurons can be removed"
    return f"the projections of an MLP{more}"


def _stacked(spec: dict[str, Any], site: Site) -> dict[str, Any]:
    """Return the spec of a site's block, or of one for each of its experts."""
    if not site.experts:
        return spec
    return {
        "structure": Experts.name,
        "experts": site.experts,
        "transposed": site.transposed,
        "of": spec,
    }


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
