"""The result of planning: every site and what becomes of it. Made by `plan`, never by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmslim.anatomy.sites import Layers, Mlp
from llmslim.init import method_named
from llmslim.modeling.experts import Experts
from llmslim.recipe import Recipe
from llmslim.report.report import Report, Row

Fields = dict[str, Any]
"""Fields of a text config and their new values."""
Attributes = dict[str, dict[str, Any]]
"""Plain attributes of modules and their new values, by the modules' names."""


@dataclass(frozen=True)
class DepthPlan:
    """How a model with fewer decoder layers is described."""

    fields: Fields = field(default_factory=dict)
    """What changes in its text config."""
    attributes: Attributes = field(default_factory=dict)
    """What changes with these fields outside of the layers."""
    record: dict[str, Any] | None = None
    """The config's `llmslim.depth`; None where the fields suffice."""
    notes: tuple[str, ...] = ()
    """Sentences for the report."""


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
    also: tuple[str, ...] = ()
    """Further names of the same map in the source model: a module shared or tied between layers."""

    @property
    def is_experts(self) -> bool:
        """Whether it is a parameter that stacks one map for each expert."""
        return bool(self.spec["structure"] == Experts.name)


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

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of its projections."""
        return (*self.mlp.up, self.mlp.down)


@dataclass(frozen=True)
class Plan:
    """Everything a recipe does to one model; made by `plan`, carried out by `rewrite`.

    In a shell and in a notebook it shows as its report does.
    """

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
    depth: DepthPlan | None = None
    """How the layers that stay are described; None leaves the depth alone."""
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

    def __repr__(self) -> str:
        return repr(self.report())

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    def show(self) -> Path:
        """Open the report as a page in the browser; return the temporary file with it."""
        return self.report().show()

    def new_name(self, name: str) -> str:
        """Return what a module of the source model is called afterwards."""
        if self.layers is None or self.keep_layers is None:
            return name
        places = {old: new for new, old in enumerate(self.keep_layers)}
        return self.layers.renamed(name, places)
