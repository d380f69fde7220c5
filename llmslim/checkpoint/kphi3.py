"""Read the published kphi-3 checkpoints (`model_type: kphi3`) as slim Phi-3 models.

Their own modelling code is remote code and is never run. Their network is Phi-3's with grouped
blocks in place of the projections, so it loads into transformers' Phi3ForCausalLM with sites:

    file                                        here
    X.first_pointwise_conv.weight (G, i, o)     X.weight (G, 2i, o), both stacked      kind io
    X.second_pointwise_conv.weight (G, i, o)
    X.first_pointwise_conv.weight (G, i, o)     X.weight                               kind residual
    X.second_pointwise_conv.weight (G, o, o)    X.second, only where I >= O
    X.first_pointwise_conv.group_layers.0       X.weight (O, I), an nn.Linear          G = 1
    model.embed_to_hidden, hidden_to_embed      the projection inside model.embed_tokens, lm_head

Two revisions of the code exist under one model_type, with one kind of block each; config.json
does not say which, the tensors do. Every tensor of the files ends in the model and every
parameter of the model comes from the files: anything else is an error, found from the shard
headers before a weight is read.

What differs: `sliding_window` holds for every attention implementation here, in the published
code for FlashAttention only (no published run sets it); dropout of embeddings is not carried
over; input embeddings given directly are of the hidden size, not of `embed_size`.

Shapes: I = in_features, O = out_features, G = groups, i = I/G, o = O/G.
Source: https://github.com/joaopauloschuler/less-parameters-llm, src/modeling_kphi3.py.
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from llmslim.errors import CheckpointError, raise_together
from llmslim.modeling.modeling_llmslim import become_slim, replace_sites
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
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_SHOWN = 10
"""Tensor names that one message lists at most."""


def is_kphi3_config(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json, read as a dictionary, is a published kphi-3 model's."""
    return config.get("model_type") == "kphi3"


def load_kphi3(folder: Path, *, dtype: str | None = None) -> PreTrainedModel:
    """Load a published kphi-3 checkpoint.

    Args:
        folder: holds config.json and model.safetensors, or shards with their index.
        dtype: name of a torch type, `bfloat16` or `float32` say; by default the files' own, the
            widest where they mix several.

    Returns:
        A slim Phi3ForCausalLM on the CPU, in eval mode, of the published model's function.

    Raises:
        CheckpointError: if the folder is not a whole kphi-3 checkpoint.
    """
    fields = _read_fields(folder / "config.json")
    with ExitStack() as stack:
        handles = _open_tensors(folder, stack)
        slices = {name: handle.get_slice(name) for name, handle in handles.items()}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        kept_dtype = _common_dtype(folder, {n: part.get_dtype() for n, part in slices.items()})
        model, sources = _empty_model(folder / "config.json", fields, shapes)
        parameters = dict(model.named_parameters())
        origin = {name: sources.get(name, (name,)) for name in parameters}
        _check_tensors(folder, shapes, origin, parameters)
        wanted = kept_dtype if dtype is None else _named_dtype(dtype)
        for name, parts in origin.items():
            tensors = [handles[part].get_tensor(part).to(wanted) for part in parts]
            _set_parameter(model, name, tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1))
    # The rotary table is no weight: it is computed, here from the config once more, off meta.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.tie_weights()
    model.config.dtype = wanted
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}/generation_config.json: {error}") from error
    return model.eval()


@dataclass(frozen=True)
class _Block:
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
        # With one group the published block is a list of one nn.Linear.
        leaf = "weight" if self.groups > 1 else "group_layers.0.weight"
        return f"{self.published}.first_pointwise_conv.{leaf}"

    @property
    def second(self) -> str:
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


def _read_fields(file: Path) -> dict[str, Any]:
    """Return the fields of a kphi-3 config.json, defaults filled in.

    Raises:
        CheckpointError: if it is not one, or its sizes do not fit each other.
    """
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}).") from error
    if not isinstance(given, dict) or not is_kphi3_config(given):
        raise CheckpointError(f"{file}: not a kphi-3 config; its model_type must be kphi3.")
    fields = {key: given.get(key, default) for key, default in _DEFAULTS.items()}
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    wrong = [
        CheckpointError(f"{file}: {key} {fields[key]!r}; allowed a whole number above 0.")
        for key in _SIZES
        if type(fields[key]) is not int or fields[key] < 1
    ]
    least = fields["min_channels_per_group"]
    if type(least) is not int or least == 0:
        wrong.append(
            CheckpointError(
                f"{file}: min_channels_per_group {least!r}; allowed whole numbers but 0."
            )
        )
    raise_together(wrong)
    for whole, part in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_key_value_heads"),
    ):
        if fields[whole] % fields[part]:
            raise CheckpointError(
                f"{file}: {part} {fields[part]} does not divide {whole} {fields[whole]}."
            )
    return fields


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Open every shard; return the open file that holds each tensor.

    Raises:
        CheckpointError: if there are no safetensors, or one cannot be opened.
    """
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not an index of shards ({error!r}).") from error
    elif not (folder / "model.safetensors").is_file():
        if any(folder.glob("*.bin")):
            raise CheckpointError(
                f"{folder}: weights only as pickle (.bin), which runs code when read; allowed "
                "safetensors. Convert them where you trust them: `save_file(torch.load(FILE, "
                "weights_only=True), 'model.safetensors')` with safetensors.torch."
            )
        raise CheckpointError(f"{folder}: no model.safetensors and no index of shards.")
    handles: dict[str, Any] = {}
    for file in sorted(map(str, files)):
        if Path(file).name != file:
            raise CheckpointError(f"{index}: shard {file!r}; allowed names of files beside it.")
        try:
            handle = stack.enter_context(safe_open(folder / file, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{folder / file}: not a whole safetensors file ({error})."
            ) from error
        handles.update(dict.fromkeys(handle.keys(), handle))
    return handles


def _common_dtype(folder: Path, dtypes: Mapping[str, str]) -> torch.dtype:
    """Return the narrowest type that holds every tensor exactly.

    Raises:
        CheckpointError: if a tensor is not of a plain floating-point type.
    """
    other = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in _DTYPES]
    if other:
        raise CheckpointError(
            f"{folder}: {_some(other)}; allowed types {', '.join(_DTYPES)}. Quantised weights "
            "cannot be read."
        )
    found = [_DTYPES[dtype] for dtype in dtypes.values()]
    return reduce(torch.promote_types, found) if found else torch.float32


def _named_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if dtype not in _DTYPES.values():
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES.values())
        raise CheckpointError(f"dtype {name!r}; allowed {allowed}.")
    assert isinstance(dtype, torch.dtype)
    return dtype


def _empty_model(
    file: Path, fields: dict[str, Any], shapes: Mapping[str, Shape]
) -> tuple[Any, dict[str, tuple[str, ...]]]:
    """Return the slim model on meta, and the tensors that make each parameter of its blocks.

    Raises:
        CheckpointError: if transformers refuses the config's values.
    """
    layer_blocks, embedding_blocks = _blocks(fields)
    sites, sources = {}, {}
    # The two lots come from different lines of the published code and may differ in kind.
    for lot in (layer_blocks, embedding_blocks):
        kinds = _kinds(lot, shapes)
        for block in lot:
            sources.update(block.sources(kinds[block]))
            if block.groups > 1 or lot is embedding_blocks:
                sites[block.module] = block.spec(kinds[block])
    if embedding_blocks:
        wider, narrower = (sites.pop(block.module) for block in embedding_blocks)
        sites["model.embed_tokens"] = {
            "structure": "factored_embedding",
            "num_embeddings": fields["vocab_size"],
            "embedding_dim": fields["embed_size"],
            "padding_idx": fields["pad_token_id"],
            "projection": wider,
        }
        sites["lm_head"] = {
            "structure": "factored_head",
            "out_features": fields["vocab_size"],
            "projection": narrower,
        }
    try:
        config = _phi3_config(fields)
        with torch.device("meta"):
            model = Phi3ForCausalLM(config)
    except (
        StrictDataclassError,
        AssertionError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(f"{file}: not a config that Phi-3 can have; {error}") from error
    replace_sites(model, sites)
    become_slim(model, sites)
    model.tie_weights()
    return model, sources


def _phi3_config(fields: dict[str, Any]) -> Phi3Config:
    own = dict(fields)
    for key in ("embed_size", "min_channels_per_group"):
        del own[key]
    rope = {"rope_type": "default", "rope_theta": own.pop("rope_theta")}
    scaling = own.pop("rope_scaling")
    if scaling is not None:
        kind = scaling["type"]
        # The published config class reads the two older names as longrope, too.
        rope["rope_type"] = "longrope" if kind in ("su", "yarn") else kind
        rope["short_factor"] = scaling["short_factor"]
        rope["long_factor"] = scaling["long_factor"]
        rope["original_max_position_embeddings"] = own["original_max_position_embeddings"]
    return Phi3Config(**own, rope_parameters=rope)


def _blocks(fields: dict[str, Any]) -> tuple[list[_Block], list[_Block]]:
    """Return the blocks of the decoder layers, and the two around an embedding of other width."""
    least = fields["min_channels_per_group"]

    def block(published: str, in_features: int, out_features: int, module: str = "") -> _Block:
        try:
            groups = groups_for_min_channels(in_features, out_features, least)
        except StaysDense:
            groups = 1
        return _Block(published, module or published, in_features, out_features, groups)

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


def _kinds(blocks: list[_Block], shapes: Mapping[str, Shape]) -> dict[_Block, str]:
    """Return `io` or `residual` for each block, as the tensors' shapes say.

    A second tensor (G, i, o) is io, (G, o, o) residual. Where I = O they are the same, and where
    it is absent it may be missing: such a block is of the kind of the certain one nearest by name.
    Only if there is none at all does an absent second tensor itself mean residual.
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
        absent |= second is None and I < O

    def kind(name: str) -> str:
        if certain:
            return certain[max(certain, key=lambda other: _shared_length(name, other))]
        return "residual" if absent else "io"

    return {block: certain.get(block.published) or kind(block.published) for block in blocks}


def _shared_length(name: str, other: str) -> int:
    return len(os.path.commonprefix((name, other)))


def _check_tensors(
    folder: Path,
    shapes: Mapping[str, Shape],
    origin: Mapping[str, tuple[str, ...]],
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """Compare the files' tensors with what the model takes.

    Raises:
        CheckpointError: with all tensors that are missing, left over or of another shape.
    """
    expected: dict[str, Shape] = {}
    for name, parts in origin.items():
        shape = list(parameters[name].shape)
        if len(parts) > 1:
            shape[1] //= len(parts)
        expected.update(dict.fromkeys(parts, tuple(shape)))
    misshapen = [
        f"{name} {shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    raise_together(
        [
            CheckpointError(f"{folder}: {what} {_some(names)}.")
            for what, names in (
                ("missing weights", sorted(expected.keys() - shapes.keys())),
                ("left-over weights", sorted(shapes.keys() - expected.keys())),
                ("weights of another shape", misshapen),
            )
            if names
        ]
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _set_parameter(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor))
