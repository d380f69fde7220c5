"""What a published kphi-3 model is made of, in names and integers; no torch.

Two revisions of the published code exist under one model_type, with one kind of block each:

    io          first (G, i, o), second (G, i, o)                           side by side
    residual    first (G, i, o), second (G, o, o) only where I >= O         one after the other

config.json does not say which; the shapes of the tensors do.

Shapes: I = in_features, O = out_features, G = groups, i = I/G, o = O/G.
Source: https://github.com/joaopauloschuler/less-parameters-llm, src/configuration_kphi3.py and
src/modeling_kphi3.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from llmslim.errors import CheckpointError, raise_together
from llmslim.modeling.sizes import StaysDense, groups_for_min_channels

Shape = tuple[int, ...]

# What the published config class takes, with its defaults. Other keys it keeps but never reads.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32064,
    "embed_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": None,
    "resid_pdrop": 0.0,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
    "sliding_window": None,
    "min_channels_per_group": 256,
}
_SIZES = (
    "vocab_size",
    "embed_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def is_kphi3_config(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json, read as a dictionary, is a published kphi-3 model's."""
    return config.get("model_type") == "kphi3"


def check_fields(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of a kphi-3 config.json, defaults filled in.

    Args:
        given: the file's JSON object.
        where: the file, for messages.

    Raises:
        CheckpointError: if it is not one, or its sizes do not fit each other.
    """
    if not is_kphi3_config(given):
        raise CheckpointError(f"{where}: not a kphi-3 config; its model_type must be kphi3.")
    fields = {key: given.get(key, default) for key, default in _DEFAULTS.items()}
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    wrong = [
        CheckpointError(f"{where}: {key} {fields[key]!r}; allowed a whole number above 0.")
        for key in _SIZES
        if type(fields[key]) is not int or fields[key] < 1
    ]
    least = fields["min_channels_per_group"]
    if type(least) is not int or least == 0:
        wrong.append(
            CheckpointError(
                f"{where}: min_channels_per_group {least!r}; allowed whole numbers but 0."
            )
        )
    raise_together(wrong)
    for whole, part in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_key_value_heads"),
    ):
        if fields[whole] % fields[part]:
            raise CheckpointError(
                f"{where}: {part} {fields[part]} does not divide {whole} {fields[whole]}."
            )
    return fields


@dataclass(frozen=True)
class Block:
    """A grouped block of the published model."""

    published: str
    """Its module's name in the files."""
    module: str
    """The name of the module that takes its place in the slim model."""
    in_features: int
    out_features: int
    groups: int

    @property
    def first(self) -> str:
        """Name of its first tensor in the files."""
        # With one group the published block is a list of one nn.Linear.
        leaf = "weight" if self.groups > 1 else "group_layers.0.weight"
        return f"{self.published}.first_pointwise_conv.{leaf}"

    @property
    def second(self) -> str:
        """Name of its second tensor, if it has one."""
        return f"{self.published}.second_pointwise_conv.weight"

    def spec(self, kind: str) -> dict[str, Any]:
        """Return what `llmslim.modeling.structured.build` needs."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "bias": False}
        if self.groups == 1:
            return {"structure": "linear", **sizes}
        options = {"groups": self.groups, "variant": kind}
        return {"structure": "grouped_pointwise", **sizes, **options}

    def sources(self, kind: str) -> dict[str, tuple[str, ...]]:
        """Return which tensors of the files, stacked along dimension 1, make each parameter."""
        if self.groups == 1:
            return {f"{self.module}.weight": (self.first,)}
        if kind == "io":
            return {f"{self.module}.weight": (self.first, self.second)}
        return {f"{self.module}.weight": (self.first,), f"{self.module}.second": (self.second,)}


def blocks_of(fields: dict[str, Any]) -> tuple[list[Block], list[Block]]:
    """Return the blocks of the decoder layers, and the two around an embedding of other width."""
    least = fields["min_channels_per_group"]

    def block(published: str, in_features: int, out_features: int, module: str = "") -> Block:
        try:
            groups = groups_for_min_channels(in_features, out_features, least)
        except StaysDense:
            groups = 1
        return Block(published, module or published, in_features, out_features, groups)

    hidden, inner, width = (
        fields[key] for key in ("hidden_size", "intermediate_size", "embed_size")
    )
    head_dim = hidden // fields["num_attention_heads"]
    qkv = hidden + 2 * fields["num_key_value_heads"] * head_dim
    in_layers = []
    # Below zero the published code makes plain nn.Linear projections, named as Phi-3's.
    for n in range(fields["num_hidden_layers"] if least > 0 else 0):
        attention, mlp = f"model.layers.{n}.self_attn", f"model.layers.{n}.mlp"
        in_layers += [
            block(f"{attention}.qkv_proj", hidden, qkv),
            block(f"{attention}.o_proj", hidden, hidden),
            block(f"{mlp}.gate_up_proj", hidden, 2 * inner),
            block(f"{mlp}.down_proj", inner, hidden),
        ]
    if width == hidden:
        return in_layers, []
    return in_layers, [
        block("model.embed_to_hidden", width, hidden, "model.embed_tokens.projection"),
        block("hidden_to_embed", hidden, width, "lm_head.projection"),
    ]


def block_kinds(blocks: list[Block], shapes: Mapping[str, Shape]) -> dict[Block, str]:
    """Return `io` or `residual` for each block, as the tensors' shapes say.

    A second tensor (G, i, o) is io, (G, o, o) residual. Where I = O they are the same, and where
    it is absent it may be missing: such a block is of the kind of the certain one nearest by name.
    Only if there is none at all does an absent second tensor itself mean residual. Without any
    tensors (a config alone) all are io, as in the published models.
    """
    certain: dict[str, str] = {}
    absent = False
    for block in blocks:
        G, I, O = block.groups, block.in_features, block.out_features  # noqa: E741
        if G == 1 or I == O:
            continue
        second = shapes.get(block.second)
        if second == (G, I // G, O // G):
            certain[block.published] = "io"
        elif second == (G, O // G, O // G) and I > O:
            certain[block.published] = "residual"
        absent |= second is None and I < O and bool(shapes)

    def kind(name: str) -> str:
        if certain:
            return certain[max(certain, key=lambda other: _shared_parts(name, other))]
        return "residual" if absent else "io"

    return {block: certain.get(block.published) or kind(block.published) for block in blocks}


def _shared_parts(name: str, other: str) -> int:
    """Return how many parts of two dotted names agree, from the left."""
    pairs = zip(name.split("."), other.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
