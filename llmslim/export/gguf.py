"""Write a model as a GGUF file, for llama.cpp and what is built on it.

Blocks are multiplied out, and one tensor at a time is worked out, encoded and written. MLPs of
different widths keep them where llama.cpp can read a width for each layer: in its architecture
`deci`, a Llama in all else. Elsewhere they get neurons of zeros up to the widest one. Widths of
quantised files are multiples of 32, the weights that share a scale.

llama.cpp rotates neighbouring channels of Llama's queries and keys, transformers the two halves of
a head; their rows are stored in llama.cpp's order.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmslim.atomic import check_file_target, disk_problem, replacing
from llmslim.compat import scaled_rotation
from llmslim.errors import CheckpointError
from llmslim.options import QUANTIZATIONS

from .dense import PlainModel, Weight, plain_model, stored
from .gguf_architecture import (
    REMEDY,
    Architecture,
    architecture_of,
    head_dim,
    metadata,
    rotated,
    rotations,
    with_widths,
)
from .gguf_tokenizer import add_tokenizer

_SHARED_SCALE = 32
_HEAD_AND_TABLE = ("output.weight", "token_embd.weight")


def check_gguf_export(out: Path, quantize: str, *, overwrite: bool = False) -> None:
    """Refuse what cannot be written, before any work is done for it.

    Args:
        out: the file to write.
        quantize: one of `QUANTIZATIONS`.
        overwrite: whether a file that is there already may be replaced.

    Raises:
        CheckpointError: if the type is not known, the file cannot be there, or the package `gguf`
            is missing.
    """
    if quantize not in QUANTIZATIONS:
        raise CheckpointError(f"quantize: {quantize!r}; allowed {', '.join(QUANTIZATIONS)}.")
    check_file_target(out, overwrite)
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{out}: writing GGUF needs the gguf package. Run pip install 'llmslim-toolkit[gguf]'."
        ) from error


@torch.no_grad()
def write_gguf(
    model: PreTrainedModel,
    out: Path,
    *,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    quantize: str = "f16",
) -> Path:
    """Write a model to a file that appears only when it is complete.

    Args:
        model: slim or not; it stays as it is.
        out: the file, as `check_gguf_export` accepted it; replaced if it is there.
        name: of the model, for programs that list models.
        tokenizer: goes into the file, with its chat template.
        quantize: one of `QUANTIZATIONS`, the type of matrices whose rows it can hold; others are
            float16. With q4_0 the embedding and the head are q8_0, vectors are always float32.

    Raises:
        CheckpointError: if llama.cpp has no such architecture or tokenizer, or the file cannot be
            written; what was there is then unchanged.
    """
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

    plain = plain_model(model)
    architecture = architecture_of(plain)
    architecture, weights, widths = with_widths(
        plain, architecture, 1 if quantize in QUANTIZATIONS[:2] else _SHARED_SCALE
    )
    tensors = dict(_tensors(plain, architecture, weights))
    file_type = {"f32": "ALL_F32"}.get(quantize, f"MOSTLY_{quantize.upper()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as partial:
            writer = GGUFWriter(partial, architecture.name)
            writer.add_name(name)
            writer.add_file_type(int(LlamaFileType[file_type]))
            writer.add_quantization_version(GGML_QUANT_VERSION)
            _add_keys(writer, metadata(plain, architecture, widths))
            rows = weights["model.embed_tokens.weight"].shape[0]
            add_tokenizer(writer, tokenizer, rows)
            _write_tensors(writer, tensors, quantize)
    except OSError as error:
        problem = disk_problem(error) or f"it cannot be written ({error})."
        raise CheckpointError(f"{out}: {problem}") from error
    return out


def _add_keys(writer: Any, keys: Mapping[str, Any]) -> None:
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in keys.items():
        adders.get(type(value), writer.add_array)(f"{writer.arch}.{key}", value)


def _tensors(
    plain: PlainModel, architecture: Architecture, weights: Mapping[str, Weight]
) -> Iterator[tuple[str, Weight]]:
    """Yield the tensors of the file by llama.cpp's names, still to be worked out.

    Raises:
        CheckpointError: if there is no name for one.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config: Any = plain.config
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = get_tensor_name_map(number, config.num_hidden_layers)
    for key, weight in weights.items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        parts = _split(key, weight, config) if architecture.name == "deci" else {key: weight}
        for part, each in parts.items():
            name = known.get_name(part, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise CheckpointError(
                    f"{part}: llama.cpp's {architecture.name} has no such tensor. {REMEDY}"
                )
            yield name, _as_stored(part, each, architecture, config)
    for name, factors in _rotation_factors(config).items():
        yield name, stored(factors)


def _split(key: str, weight: Weight, config: Any) -> dict[str, Weight]:
    """Return the projections that are fused in Phi-3's, under Llama's names."""
    head = head_dim(config)
    keys = config.num_key_value_heads * head
    fused = {
        "qkv_proj": {"q_proj": config.num_attention_heads * head, "k_proj": keys, "v_proj": keys},
        "gate_up_proj": dict.fromkeys(("gate_proj", "up_proj"), weight.shape[0] // 2),
    }
    leaf = key.split(".")[-2]
    parts, start = {}, 0
    for name, rows in fused.get(leaf, {leaf: weight.shape[0]}).items():
        some = functools.partial(torch.narrow, dim=0, start=start, length=rows)
        parts[key.replace(f"{leaf}.", f"{name}.")] = weight.then((rows, *weight.shape[1:]), some)
        start += rows
    return parts


def _as_stored(key: str, weight: Weight, architecture: Architecture, config: Any) -> Weight:
    """Return a tensor with its rows and values as llama.cpp has them."""
    leaf = key.split(".")[-2]
    if leaf in ("q_proj", "k_proj") and architecture.rotates_pairs:
        heads = config.num_attention_heads if leaf == "q_proj" else config.num_key_value_heads
        return weight.then(
            weight.shape,
            lambda t: t.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2),
        )
    if leaf.endswith("norm") and architecture.norms_from_one:
        return weight.then(weight.shape, lambda t: t.float() + 1)
    return weight


def _rotation_factors(config: Any) -> dict[str, Tensor]:
    """Return what each rotated channel's frequency is divided by, where it is."""
    full = rotations(config)[0]
    if full["rope_type"] == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(full[f"{length}_factor"])
            for length in ("long", "short")
        }
    if full["rope_type"] != "llama3":
        return {}
    size = rotated(config)
    plain = full["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return {"rope_freqs.weight": plain / scaled_rotation(config)[0]}


def _write_tensors(writer: Any, tensors: Mapping[str, Weight], quantize: str) -> None:
    """Write metadata and tensors; each is worked out when its turn comes.

    Raises:
        CheckpointError: if a type cannot hold a tensor's values.
    """
    from gguf import GGML_QUANT_SIZES

    kinds = {name: _kind(name, weight.shape, quantize) for name, weight in tensors.items()}
    for name, weight in tensors.items():
        block, size = GGML_QUANT_SIZES[kinds[name]]
        count = prod(weight.shape) // block * size
        writer.add_tensor_info(name, weight.shape, np.float32, count, raw_dtype=kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weight in tensors.items():
            writer.write_tensor_data(_encoded(name, weight.tensor(), kinds[name]))
    finally:
        writer.close()


def _kind(name: str, shape: tuple[int, ...], quantize: str) -> Any:
    """Return the type that a tensor is stored in."""
    from gguf import GGMLQuantizationType

    if len(shape) == 1:
        kind = "f32"
    elif quantize in QUANTIZATIONS[:2]:
        kind = quantize
    elif shape[-1] % _SHARED_SCALE:
        kind = "f16"
    else:
        kind = "q8_0" if name in _HEAD_AND_TABLE else quantize
    return GGMLQuantizationType[kind.upper()]


def _encoded(name: str, tensor: Tensor, kind: Any) -> Any:
    """Return a tensor's values in a type of GGUF.

    Raises:
        CheckpointError: if float16 cannot hold one.
    """
    from gguf import GGMLQuantizationType, quantize

    values = tensor.cpu().float().contiguous().numpy()
    with np.errstate(over="ignore"):
        encoded = quantize(values, kind)
    if kind == GGMLQuantizationType.F16 and np.any(np.isinf(encoded) & np.isfinite(values)):
        raise CheckpointError(
            f"{name}: values up to {np.abs(values).max():.3g}; float16 holds at most 65504. "
            "Export with --quantize f32."
        )
    return encoded
