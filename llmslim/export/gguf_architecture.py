"""How llama.cpp computes each model type: its architecture, widths and metadata.

Where it would compute something else than the model, there is no architecture, and the export is
refused with the difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmslim.compat import scaled_rotation
from llmslim.errors import CheckpointError

from .dense import PlainModel, Weight

REMEDY = "Export with --dense for runtimes that read safetensors."


@dataclass(frozen=True)
class Architecture:
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


_GEMMA = Architecture("gemma", activation="gelu_pytorch_tanh", norms_from_one=True)
_ARCHITECTURES = {
    "llama": Architecture("llama", biases=True, rotates_pairs=True, like_llama=True),
    "mistral": Architecture("llama", rotates_pairs=True, like_llama=True),
    "qwen2": Architecture("qwen2", biases=True, like_llama=True),
    "qwen3": Architecture("qwen3"),
    "phi3": Architecture("phi3", like_llama=True),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, name="gemma2", period=2, largest=46),
    "gemma3_text": replace(_GEMMA, name="gemma3", period=6, largest=62),
}


def architecture_of(plain: PlainModel) -> Architecture:
    """Return how llama.cpp computes a model.

    Raises:
        CheckpointError: if it does not, or computes something else.
    """
    config: Any = plain.config
    where = plain.base.__name__
    if config.model_type not in _ARCHITECTURES:
        raise CheckpointError(
            f"{where}: no GGUF form of model type {config.model_type} is known here; allowed "
            f"{', '.join(_ARCHITECTURES)}. {REMEDY}"
        )
    found = _ARCHITECTURES[config.model_type]
    for problem in _differences(plain, found):
        raise CheckpointError(
            f"{where}: {problem}; llama.cpp's {found.name} would compute something else. {REMEDY}"
        )
    return found


def _differences(plain: PlainModel, found: Architecture) -> Iterator[str]:
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
    if found.name == "phi3" and head_dim(config) * config.num_attention_heads != (
        config.hidden_size
    ):
        yield "heads that are wider or narrower together than the hidden state"
    if found.period:
        yield from _gemma_differences(config, found)
    full, sliding = rotations(config)
    kind = full["rope_type"]
    allowed = {"default", "linear", *_FACTORS.get(found.name, ())}
    if kind not in allowed:
        yield f"rope_type {kind}, where {', '.join(sorted(allowed))} are allowed"
    if sliding["rope_type"] not in ("default", kind if sliding is full else "default"):
        yield f"rope_type {sliding['rope_type']} of sliding attention, where default is allowed"


def _gemma_differences(config: Any, found: Architecture) -> Iterator[str]:
    kinds = [
        "full_attention" if (i + 1) % found.period == 0 else "sliding_attention"
        for i in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != kinds:
        yield f"layer_types other than one full attention in {found.period} layers"
    scaled_by = head_dim(config)
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


def rotations(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters of the rotation in full and in sliding attention."""
    found = config.rope_parameters
    return found.get("full_attention", found), found.get("sliding_attention", found)


def head_dim(config: Any) -> int:
    """Return how many channels a head has."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def rotated(config: Any) -> int:
    """Return how many channels of a head are rotated."""
    share = rotations(config)[0].get("partial_rotary_factor", 1.0)
    return int(head_dim(config) * share)


def with_widths(
    plain: PlainModel, architecture: Architecture, multiple: int
) -> tuple[Architecture, Mapping[str, Weight], list[int]]:
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
            f"a GGUF file has one in each. {REMEDY}"
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
    head = head_dim(config)
    known = rotations(config)[0]["rope_type"] in ("default", "linear", *_FACTORS["deci"])
    return known and rotated(config) == head


def _context(config: Any, architecture: Architecture) -> int:
    """Return for how many tokens llama.cpp computes what the model does.

    Where its architecture knows no window, that is the window.
    """
    longest = int(config.max_position_embeddings)
    window = int(getattr(config, "sliding_window", None) or 0)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    ignored = window and not architecture.period and "sliding_attention" in kinds
    return min(longest, window) if ignored else longest


def metadata(plain: PlainModel, architecture: Architecture, widths: list[int]) -> dict[str, Any]:
    """Return the metadata that llama.cpp builds the model from, without the architecture's name."""
    config: Any = plain.config
    head = head_dim(config)
    full, sliding = rotations(config)
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
        "rope.dimension_count": rotated(config),
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
