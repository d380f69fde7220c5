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

Every tensor of the files ends in the model and every parameter of the model comes from the files:
anything else is an error, found from the shard headers before a weight is read.

What differs: `sliding_window` holds for every attention implementation here, in the published
code for FlashAttention only (no published run sets it); dropout of embeddings is not carried
over; input embeddings given directly are of the hidden size, not of `embed_size`.

Shapes: I = in_features, O = out_features, G = groups, i = I/G, o = O/G.
Source: https://github.com/joaopauloschuler/less-parameters-llm, src/modeling_kphi3.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    GenerationConfig,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from llmslim.errors import CheckpointError, and_more, raise_together
from llmslim.modeling.modeling_llmslim import become_slim, replace_sites

from .kphi3_layout import block_kinds, blocks_of, check_fields
from .safetensors_io import (
    FLOATS,
    INDEX,
    WEIGHTS,
    Entry,
    read_json,
    read_weights,
)

_SHOWN = 10
"""Tensor names that one message lists at most."""


def load_kphi3(folder: Path, *, dtype: str | None = None) -> PreTrainedModel:
    """Load a published kphi-3 checkpoint.

    Args:
        folder: holds config.json and model.safetensors, or shards with their index.
        dtype: name of a torch type, `bfloat16` or `float32` say; by default the files' own, the
            narrowest that holds every weight exactly where they mix several.

    Returns:
        A slim Phi3ForCausalLM on the CPU, in eval mode, of the published model's function.

    Raises:
        CheckpointError: if the folder is not a whole kphi-3 checkpoint.
    """
    entries = read_weights(folder)
    wanted = _wanted_dtype(folder, dtype, entries)
    model, sources = _empty_model(folder, entries)
    parameters = dict(model.named_parameters())
    origin = {name: sources.get(name, (name,)) for name in parameters}
    _check_tensors(folder, entries, origin, parameters)
    with ExitStack() as stack:
        try:
            opened = {
                path: stack.enter_context(safe_open(path, framework="pt"))
                for path in {entry.path for entry in entries.values()}
            }
        except (OSError, SafetensorError) as error:  # changed since its header was read
            raise CheckpointError(f"{folder}: cannot be read ({error}).") from error
        for name, parts in origin.items():
            tensors = [opened[entries[part].path].get_tensor(part).to(wanted) for part in parts]
            parent, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1))
            setattr(model.get_submodule(parent), leaf, parameter)
    # The rotary table is no weight: it is computed from the config, here once more, off meta.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.tie_weights()
    model.config.dtype = wanted
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}/generation_config.json: {error}") from error
    slim: PreTrainedModel = model.eval()
    return slim


def kphi3_config(folder: Path) -> PreTrainedConfig:
    """Return the config that `load_kphi3`'s model has, without reading a weight.

    Args:
        folder: holds config.json; the kind of the blocks is read from the headers of its weights,
            or is `io`, as in the published models, where there are none.

    Raises:
        CheckpointError: if config.json is not a kphi-3 model's, or a weight file is not whole.
    """
    has_weights = (folder / WEIGHTS).exists() or (folder / INDEX).exists()
    model, _ = _empty_model(folder, read_weights(folder) if has_weights else {})
    config: PreTrainedConfig = model.config
    return config


def _wanted_dtype(folder: Path, dtype: str | None, entries: Mapping[str, Entry]) -> torch.dtype:
    """Return the type given, else the narrowest that holds every tensor exactly.

    Raises:
        CheckpointError: if that one, or a tensor's, is not a plain floating-point type.
    """
    other = [f"{name} ({e.dtype})" for name, e in entries.items() if e.dtype not in FLOATS]
    if other:
        raise CheckpointError(
            f"{folder}: {and_more(other, _SHOWN)}; allowed types {', '.join(FLOATS)}."
        )
    names = {FLOATS[e.dtype] for e in entries.values()} if dtype is None else {dtype}
    dtypes: list[torch.dtype] = [getattr(torch, name) for name in names]
    return reduce(torch.promote_types, dtypes, dtypes[0]) if dtypes else torch.float32


def _empty_model(
    folder: Path, entries: Mapping[str, Entry]
) -> tuple[Any, dict[str, tuple[str, ...]]]:
    """Return the slim model on meta, and the tensors that make each parameter of its blocks.

    Raises:
        CheckpointError: if transformers refuses the config's values.
    """
    file = folder / "config.json"
    fields = check_fields(read_json(file), str(file))
    layer_blocks, embedding_blocks = blocks_of(fields)
    shapes = {name: entry.shape for name, entry in entries.items()}
    # The two lots come from different lines of the published code and may differ in kind.
    kinds = {**block_kinds(layer_blocks, shapes), **block_kinds(embedding_blocks, shapes)}
    sources: dict[str, tuple[str, ...]] = {}
    for block, kind in kinds.items():
        sources.update(block.sources(kind))
    sites = {block.module: block.spec(kinds[block]) for block in layer_blocks if block.groups > 1}
    if embedding_blocks:
        wider, narrower = (block.spec(kinds[block]) for block in embedding_blocks)
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
        replace_sites(model, sites)
        become_slim(model, sites)
        model.tie_weights()
    except Exception as error:  # values that make no model, in as many classes as there are ways
        raise CheckpointError(
            f"{file}: not a config that Phi-3 can have ({type(error).__name__}: {error})."
        ) from error
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


def _check_tensors(
    folder: Path,
    entries: Mapping[str, Entry],
    origin: Mapping[str, tuple[str, ...]],
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """Compare the files' tensors with what the model takes.

    Raises:
        CheckpointError: with all tensors that are missing, left over or of another shape.
    """
    shapes = {name: entry.shape for name, entry in entries.items()}
    expected: dict[str, tuple[int, ...]] = {}
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
            CheckpointError(f"{folder}: {what} {and_more(names, _SHOWN)}.")
            for what, names in (
                ("missing weights", sorted(expected.keys() - shapes.keys())),
                ("left-over weights", sorted(shapes.keys() - expected.keys())),
                ("weights of another shape", misshapen),
            )
            if names
        ]
    )
