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
from dataclasses import dataclass, replace
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
from .gguf_tokenizer import add_tokenizer

_SHARED_SCALE = 32
_HEAD_AND_TABLE = ("output.weight", "token_embd.weight")
_REMEDY = "Export with --dense for runtimes that read safetensors."


@dataclass(frozen=True)
class _Architecture:
    """How llama.cpp computes a model type."""

    name: str
    activation: str = "silu"
    biases: bool = False
    """Whether it reads biases of projections."""
    rotates_pairs: bool = False
    """Whether rows of queries and keys are in the order of rotated pairs."""
    like_llama: bool = False
    """Whether `deci` computes the same once fused projections are split."""
    norms_from_one: bool = False
    """Whether transformers stores the weights of its norms less one."""
    period: int = 0
    """Every layer of so many attends to all tokens, the others to a window."""
    largest: int = 0
    """Number of layers of the one size whose attention llama.cpp scales in another way."""


_GEMMA = _Architecture("gemma", activation="gelu_pytorch_tanh", norms_from_one=True)
_ARCHITECTURES = {
    "llama": _Architecture("llama", biases=True, rotates_pairs=True, like_llama=True),
    "mistral": _Architecture("llama", rotates_pairs=True, like_llama=True),
    "qwen2": _Architecture("qwen2", biases=True, like_llama=True),
    "qwen3": _Architecture("qwen3"),
    "phi3": _Architecture("phi3", like_llama=True),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, name="gemma2", period=2, largest=46),
    "gemma3_text": replace(_GEMMA, name="gemma3", period=6, largest=62),
}


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
    architecture = _architecture(plain)
    architecture, weights, widths = _with_widths(
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
            _add_keys(writer, _keys(plain, architecture, widths))
            rows = weights["model.embed_tokens.weight"].shape[0]
            add_tokenizer(writer, tokenizer, rows)
            _write_tensors(writer, tensors, quantize)
    except OSError as error:
        problem = disk_problem(error) or f"it cannot be written ({error})."
        raise CheckpointError(f"{out}: {problem}") from error
    return out


def _architecture(plain: PlainModel) -> _Architecture:
    """Return how llama.cpp computes a model.

    Raises:
        CheckpointError: if it does not, or computes something else.
    """
    config: Any = plain.config
    where = plain.base.__name__
    if config.model_type not in _ARCHITECTURES:
        raise CheckpointError(
            f"{where}: no GGUF form of model type {config.model_type} is known here; allowed "
            f"{', '.join(_ARCHITECTURES)}. {_REMEDY}"
        )
    found = _ARCHITECTURES[config.model_type]
    for problem in _differences(plain, found):
        raise CheckpointError(
            f"{where}: {problem}; llama.cpp's {found.name} would compute something else. {_REMEDY}"
        )
    return found


def _differences(plain: PlainModel, found: _Architecture) -> Iterator[str]:
    """Yield what llama.cpp would compute otherwise, as the beginning of a sentence."""
    config: Any = plain.config
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != found.activation:
        yield f"activation {activation}, where {found.activation} is allowed"
    biases = [name for name in plain.weights if name.endswith(".bias")]
    if biases and not found.biases:
        yield f"{biases[0]}, where no bias is allowed"
    if found.norms_from_one and not config.tie_word_embeddings:
        yield "a head of its own, where the embedding is used"
    if found.name == "phi3" and _head_dim(config) * config.num_attention_heads != (
        config.hidden_size
    ):
        yield "heads that are wider or narrower together than the hidden state"
    if found.period:
        yield from _gemma_differences(config, found)
    full, sliding = _rotations(config)
    kind = full["rope_type"]
    allowed = {"default", "linear", *_FACTORS.get(found.name, ())}
    if kind not in allowed:
        yield f"rope_type {kind}, where {', '.join(sorted(allowed))} are allowed"
    if sliding["rope_type"] not in ("default", kind if sliding is full else "default"):
        yield f"rope_type {sliding['rope_type']} of sliding attention, where default is allowed"


def _gemma_differences(config: Any, found: _Architecture) -> Iterator[str]:
    kinds = [
        "full_attention" if (i + 1) % found.period == 0 else "sliding_attention"
        for i in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != kinds:
        yield f"layer_types other than one full attention in {found.period} layers"
    scaled_by = _head_dim(config)
    if config.num_hidden_layers == found.largest:
        scaled_by = config.hidden_size // config.num_attention_heads
    if config.query_pre_attn_scalar != scaled_by:
        yield f"query_pre_attn_scalar {config.query_pre_attn_scalar}, where {scaled_by} is allowed"
    if getattr(config, "use_bidirectional_attention", False):
        yield "attention to later tokens"
    capped = [config.attn_logit_softcapping, config.final_logit_softcapping]
    if None in capped and found.name == "gemma2":
        yield "no caps of logits"
    if any(capped) and found.name == "gemma3":
        yield "caps of logits"


_FACTORS = {"llama": ("llama3",), "deci": ("llama3",), "phi3": ("longrope",)}
"""Rotations with a factor for each channel, by the architectures that read them."""


def _rotations(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters of the rotation in full and in sliding attention."""
    found = config.rope_parameters
    return found.get("full_attention", found), found.get("sliding_attention", found)


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _rotated(config: Any) -> int:
    """Return how many channels of a head are rotated."""
    share = _rotations(config)[0].get("partial_rotary_factor", 1.0)
    return int(_head_dim(config) * share)


def _with_widths(
    plain: PlainModel, architecture: _Architecture, multiple: int
) -> tuple[_Architecture, Mapping[str, Weight], list[int]]:
    """Return the architecture that holds MLPs of such widths, the weights, and a width per layer.

    Args:
        plain: the model.
        architecture: for one width.
        multiple: what widths have to be multiples of.

    Raises:
        CheckpointError: if a layer's MLP is not found.
    """
    config: Any = plain.config
    found = plain.widths()
    if len(found) != config.num_hidden_layers:
        raise CheckpointError(
            f"{plain.base.__name__}: {len(found)} MLPs found in {config.num_hidden_layers} layers; "
            f"a GGUF file has one in each. {_REMEDY}"
        )
    # llama.cpp's deci takes a layer of no neurons for one without attention.
    widths = {mlp: -(-max(width, 1) // multiple) * multiple for mlp, width in found.items()}
    if len({*widths.values()}) > 1:
        if architecture.like_llama and _fits_deci(config):
            architecture = replace(architecture, name="deci", rotates_pairs=True)
        else:
            widths = dict.fromkeys(widths, max(widths.values()))
    return architecture, plain.padded(widths), list(widths.values())


def _fits_deci(config: Any) -> bool:
    """Return whether llama.cpp's `deci` computes a Llama's attention as this config has it."""
    head = _head_dim(config)
    known = _rotations(config)[0]["rope_type"] in ("default", "linear", *_FACTORS["deci"])
    return known and _rotated(config) == head


def _context(config: Any, architecture: _Architecture) -> int:
    """Return for how many tokens llama.cpp computes what the model does.

    Where its architecture knows no window, that is the window.
    """
    longest = int(config.max_position_embeddings)
    window = int(getattr(config, "sliding_window", None) or 0)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    ignored = window and not architecture.period and "sliding_attention" in kinds
    return min(longest, window) if ignored else longest


def _keys(plain: PlainModel, architecture: _Architecture, widths: list[int]) -> dict[str, Any]:
    """Return the metadata that llama.cpp builds the model from, without the architecture's name."""
    config: Any = plain.config
    head = _head_dim(config)
    full, sliding = _rotations(config)
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": _context(config, architecture),
        "embedding_length": config.hidden_size,
        "feed_forward_length": widths if architecture.name == "deci" else widths[0],
        "vocab_size": plain.weights["model.embed_tokens.weight"].shape[0],
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": _rotated(config),
        "rope.freq_base": float(full["rope_theta"]),
    }
    if full["rope_type"] == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(full["factor"])}
    if architecture.name == "phi3":
        keys["rope.scaling.original_context_length"] = config.original_max_position_embeddings
        if full["rope_type"] == "longrope":
            keys["rope.scaling.attn_factor"] = scaled_rotation(config)[1]
    if architecture.name in ("phi3", "gemma2", "gemma3") and config.sliding_window:
        keys["attention.sliding_window"] = config.sliding_window
    if architecture.name == "gemma2":
        keys["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if architecture.name == "gemma3":
        keys["rope.freq_base_swa"] = float(sliding["rope_theta"])
    return keys


def _add_keys(writer: Any, keys: Mapping[str, Any]) -> None:
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in keys.items():
        adders.get(type(value), writer.add_array)(f"{writer.arch}.{key}", value)


def _tensors(
    plain: PlainModel, architecture: _Architecture, weights: Mapping[str, Weight]
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
                    f"{part}: llama.cpp's {architecture.name} has no such tensor. {_REMEDY}"
                )
            yield name, _as_stored(part, each, architecture, config)
    for name, factors in _rotation_factors(config).items():
        yield name, stored(factors)


def _split(key: str, weight: Weight, config: Any) -> dict[str, Weight]:
    """Return the projections that are fused in Phi-3's, under Llama's names."""
    head = _head_dim(config)
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


def _as_stored(key: str, weight: Weight, architecture: _Architecture, config: Any) -> Weight:
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
    full = _rotations(config)[0]
    if full["rope_type"] == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(full[f"{length}_factor"])
            for length in ("long", "short")
        }
    if full["rope_type"] != "llama3":
        return {}
    size = _rotated(config)
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
