"""The rows of the kphi-3 report's table, and what it did not try, at three scales.

A scale is the report's model with every width divided by one number: so are the channels of a
group, and the projections have the report's own numbers of groups (12, 12, 12 and 32). All rows
beyond the report have at most the parameters of kphi-3 with three layers, and nearly as many.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Phi3Config

import llmslim
from llmslim import GroupedPointwise, Recipe
from llmslim.modeling.sizes import groups_for_min_channels

HIDDEN, HEADS, DENSE_MLP, GROUPED_MLP, MIN_CHANNELS = 3072, 32, 8192, 9216, 256
"""The report's: Phi-3-mini's, and for kphi-3 the wider MLP."""


@dataclass(frozen=True)
class Scale:
    """The report's model, some times as narrow, and how it is trained."""

    divisor: int
    """Of all widths."""
    vocabulary: int
    context_length: int
    batch_size: int
    """Rows of a step."""
    tokens: int | None
    """To train on, over all passes; None for all of the text."""
    held_out: int | None
    """Documents; None for what healing holds out."""
    rates: tuple[float, ...]
    """Learning rates that are tried."""
    seeds: int

    @property
    def hidden(self) -> int:
        """Channels between the layers."""
        return HIDDEN // self.divisor

    @property
    def heads(self) -> int:
        """Heads of attention, each of 96 channels."""
        return HEADS // self.divisor

    @property
    def min_channels(self) -> int:
        """Input channels of a group, at least."""
        return MIN_CHANNELS // self.divisor

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Input and output channels of kphi-3's projections, by role."""
        width, mlp = self.hidden, GROUPED_MLP // self.divisor
        return {
            "attention.qkv": (width, 3 * width),
            "attention.o": (width, width),
            "mlp.gate_up": (width, 2 * mlp),
            "mlp.down": (mlp, width),
        }

    @property
    def groups(self) -> dict[str, int]:
        """kphi-3's numbers of groups, by role."""
        return {
            role: groups_for_min_channels(*sizes, self.min_channels)
            for role, sizes in self.projections.items()
        }


SCALES = {
    "tiny": Scale(8, 4096, 512, 1, 3_000_000, 200, (5e-4, 1.5e-3), 3),
    "small": Scale(4, 8192, 1024, 8, 4_000_000, 500, (5e-4, 2e-3), 1),
    "full": Scale(1, 32_064, 4096, 1, None, None, (1e-4,), 1),
}


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    name: str
    scale: Scale
    layers: int
    hidden: int
    intermediate: int
    rules: tuple[dict[str, Any], ...] = ()
    """Of a recipe; none leaves it dense."""
    init: str = "random"
    initializer_range: float = 0.02
    """Standard deviation of what is dense; transformers' default."""
    learned_order: bool = False
    """Whether groups see the channels that weigh most in the dense weights drawn first."""

    @property
    def recipe(self) -> Recipe:
        """What makes the model of a dense one."""
        return Recipe.of({"name": self.name, "replace": self.rules, "init": self.init})

    def config(self, vocabulary: int, **tokens: int | None) -> Phi3Config:
        """Return the config of the dense model that it is made from.

        Args:
            vocabulary: tokens that the model knows.
            **tokens: `bos_token_id` and the like.
        """
        return Phi3Config(
            vocab_size=vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.scale.heads,
            num_key_value_heads=self.scale.heads,
            initializer_range=self.initializer_range,
            **{"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0, **tokens},
        )

    @cached_property
    def parameters(self) -> int:
        """Parameters, embeddings and head not counted."""
        return llmslim.plan(self.config(8), self.recipe).report().totals.non_embedding_after

    def model(self, config: Phi3Config, seed: int) -> Any:
        """Return the model with random weights.

        Args:
            config: from `config`.
            seed: of all weights.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
            if self.rules:
                init = "project" if self.learned_order else self.init
                llmslim.slim(model, self.recipe, init=init, seed=seed)
            if self.learned_order:  # the channels stay, at the scale of the other rows
                for module in model.modules():
                    if isinstance(module, GroupedPointwise) and module.order is not None:
                        order = module.order.clone()
                        module.reset_parameters()
                        module.order.copy_(order)
        return model


def rows_of(scale: Scale) -> dict[str, Row]:
    """Return all rows at a scale by name, those of the report first."""
    grouped = GROUPED_MLP // scale.divisor
    projections = {"role": ["attention", "mlp"]}
    io = {**projections, "structure": "grouped_pointwise", "variant": "io"}
    io["min_channels_per_group"] = scale.min_channels

    def kphi3(name: str, layers: int = 3, **changes: Any) -> Row:
        return Row(name, scale, layers, scale.hidden, grouped, **{"rules": (io,), **changes})

    found = [
        dense := Row("phi3-2", scale, 2, scale.hidden, DENSE_MLP // scale.divisor),
        kphi3("kphi3-2", 2),
        reference := kphi3("kphi3-3"),
        kphi3("published", init="random_published"),
        kphi3("learned_order", rules=({**io, "channel_order": "learned"},), learned_order=True),
    ]
    for name, structure in (
        ("residual", {"structure": "grouped_pointwise", "variant": "residual"}),
        *((name, {"structure": name}) for name in ("low_rank", "pivoted_low_rank")),
        ("block_shuffle", {"structure": "block_shuffle"}),
    ):
        # Of each projection as many weights as the block of kphi-3 has.
        rules = tuple(
            {"role": role, **structure, "keep_ratio": 2 / groups}
            for role, groups in scale.groups.items()
        )
        found.append(kphi3(name, rules=rules))
    found += [dense_like(reference, layers) for layers in (3, 1)]
    # Outputs of its projections vary as those of blocks drawn at the report's scale.
    found.append(replace(dense, name="dense-small", initializer_range=0.004))
    return {row.name: row for row in found}


def dense_like(reference: Row, layers: int) -> Row:
    """Return a dense Phi-3 with at most the parameters of another row, and nearly as many.

    Args:
        reference: the other row.
        layers: as many as the other has, and narrower; or one of full width with a narrow MLP.
    """
    scale = reference.scale
    hidden = scale.hidden
    if layers > 1:
        # 12 H² of a layer are what Phi-3's own ratio of widths has; rotary heads are even.
        unit = 2 * scale.heads
        hidden = int((reference.parameters / (12 * layers)) ** 0.5) // unit * unit
    attention_and_norms = layers * (4 * hidden**2 + 2 * hidden) + hidden
    intermediate = (reference.parameters - attention_and_norms) // (3 * hidden * layers)
    name = "dense-narrow" if layers > 1 else "dense-1"
    return Row(name, scale, layers, hidden, intermediate)
