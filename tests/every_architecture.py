"""Every architecture of transformers' causal-LM mapping: at its default size, and tiny.

Nothing is downloaded: default sizes are looked at without memory (meta device), tiny models have
random weights. Used by test_architectures.py, and by benchmarks/architectures.py, which makes
docs/architectures.md.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmslim import fitting, planning
from llmslim.anatomy.layer_calls import record_calls, run_layer
from llmslim.anatomy.sites import Mlp, find_layers, find_mlps
from llmslim.data import collate, collate_apart
from llmslim.editing.resize import resize_mlp
from llmslim.healing.packing_check import sees_neighbours, takes_position_ids
from llmslim.recipe import Recipe
from llmslim.report.report import Report

MLP_AND_ATTENTION = Recipe.of(
    {
        "init": "random",
        "replace": [
            {
                "match": [
                    "*attn*", "*attention*", "*.mixer.*", "*.mamba.*", "*lstm*", "*.conv.*",
                    "*.temporal_block.*", "*mlp*", "*ffn*", "*feed_forward*", "*.ff.*", "*.fc1",
                    "*.fc2", "*experts*", "*moe*", "*.intermediate.dense", "*.output.dense",
                ],
                "structure": "low_rank",
                "keep_ratio": 0.5,
            }
        ],
    }
)  # fmt: skip
"""What a user would write who does not know the model: all that is attention or an MLP."""

_SIZES = {
    0: """
        num_kv_shared_layers
    """,
    1: """
        first_k_dense_replace num_dense_layers moe_layer_start_index
    """,
    2: """
        num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk
        moe_k topk_group swa_num_key_value_heads n_group n_groups mamba_n_groups
        num_local_kv_heads linear_num_key_heads num_query_groups num_expert_group
        num_layers_per_stack
    """,
    4: """
        num_attention_heads n_head n_heads num_heads encoder_attention_heads attention_heads
        decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
        swa_num_attention_heads index_n_heads num_experts n_routed_experts num_local_experts
        moe_num_experts linear_num_value_heads linear_num_heads index_topk zero_expert_num
        o_groups
    """,
    8: """
        qk_rope_head_dim qk_nope_head_dim mamba_d_state state_size ssm_state_size time_step_rank
        mamba_dt_rank mamba_n_heads mamba_num_heads mamba_head_dim rotary_dim
        num_prediction_heads hidden_size_per_layer_input laurel_rank adapter_rank
    """,
    16: """
        head_dim v_head_dim kv_channels d_head dim_head swa_head_dim attention_head_dim
        qk_head_dim kv_lora_rank q_lora_rank o_lora_rank index_head_dim linear_key_head_dim
        linear_value_head_dim linear_head_dim mamba_headdim attention_head_size chunk_size
        mamba_chunk_size mamba_d_head
    """,
    32: """
        moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
        shared_intermediate_size shared_experts_intermediate_size
        moe_shared_expert_intermediate_size
    """,
    64: """
        hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim
        dim_model attention_hidden_size input_embedding_size output_embedding_size lru_width
        adapter_in_dim adapter_out_dim adapter_input_size
    """,
    96: """
        intermediate_size ffn_dim n_inner ffn_hidden_size inner_dim encoder_ffn_dim
        decoder_ffn_dim dff dim_ff d_inner feed_forward_size intermediate_size_mlp
        dense_intermediate_size
    """,
    128: """
        vocab_size vocab_size_per_layer_input max_position_embeddings n_positions
    """,
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_LAYERS = [
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
]
_KINDS = 4
_INDEXER = {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 256}
_INDEXER |= {"indexer_budget": 2048, "indexer_compress_ratio": 4}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
FILLED_IN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 64, "moe_topk": 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True},
}
"""What some configs leave empty, so that transformers builds no model of them: sizes as usual."""

_HEADS: dict[str, Any] = {"head_dim": 16, "num_key_value_heads": 2}
_TWICE: dict[str, Any] = {
    "num_hidden_layers": 5,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
}
_EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16, "mamba_n_heads": 8, "attn_layer_indices": [1]},
    "cohere_compass_text": FILLED_IN["cohere_compass_text"],
    "dbrx": {
        "attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "max_seq_len": 128,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "git": {"num_hidden_layers": 3},  # as in every real one, not as many as its image encoder has
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16, "mamba_n_heads": 8},
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": {**_HEADS, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"], "num_hidden_layers": 3},
    "mamba2": {"head_dim": 32},
    "ministral": _HEADS,
    "nemotron": _HEADS,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    # Two of the layers that share their attention.
    "zamba": {**_TWICE, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {
        **_TWICE,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}
"""What some architectures' defaults leave out, or tie to sizes of names that only they have."""

NOT_FITTED = {
    "glm_moe_dsa": "its layers hand each other more than the hidden states",
    "hrm_text": "no module list of 8 decoder layers",
    "hy_v4": "its layers hand each other more than the hidden states",
    "reformer": "its layers return ReformerOutput",
    "xlm": "more than its list of layers works on the hidden states",
    "zaya": "its layers hand each other more than the hidden states",
}
"""What cannot be fitted to text, and what is said of it."""


@dataclass(frozen=True)
class Coverage:
    """What the recipe reaches of one architecture."""

    parameters: int
    """Without embeddings and the output head."""
    covered: int
    """Of them, those in replaced maps."""
    stays: dict[str, int]
    """The others, by the reason in the ledger."""

    @property
    def share(self) -> float:
        return self.covered / self.parameters if self.parameters else 0.0


def config_classes() -> dict[str, Any]:
    """Return the config class of every entry of the mapping, by model type."""
    mapping = AutoModelForCausalLM._model_mapping._model_mapping
    return {name: CONFIG_MAPPING[name] for name in mapping}


def default_config(name: str, cls: Any) -> Any:
    """Return an architecture's default config, with what it lacks to be built filled in."""
    return cls(**FILLED_IN.get(name, {}))


def coverage(report: Report) -> Coverage:
    inner = [row for row in report.rows if not row.counts_as_embedding]
    stays: dict[str, int] = defaultdict(int)
    for row in inner:
        if row.action != "replaced" and row.params_before:
            stays[row.reason] += row.params_before
    covered = sum(row.params_before for row in inner if row.action == "replaced")
    return Coverage(sum(row.params_before for row in inner), covered, dict(stays))


def tiny_config(cls: Any, more: Mapping[str, Any] = {}, least: int = 2) -> Any:
    """Return a config of the same architecture with few and small layers.

    Every kind of layer that the default has is in it; fields of names that are not known stay as
    they are, or are as `more` says, for a part of the config by its name. `least` layers, where the
    default has as many.
    """
    return _shrunk(cls, cls(), more, least)


def _shrunk(cls: Any, default: Any, more: Mapping[str, Any] = {}, least: int = 2) -> Any:
    fields = default.to_dict()
    count = next((fields[name] for name in _LAYERS if isinstance(fields.get(name), int)), 0)
    layers = min(count, max(least, _enough_layers(fields, count)))
    small = dict(_SMALL)
    heads, shared = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if heads == shared:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if fields.get("head_dim") == fields.get("qk_rope_head_dim"):
        small["head_dim"] = small["qk_rope_head_dim"]
    changes: dict[str, Any] = {}
    for name, value in fields.items():
        if name in default.sub_configs and value is not None:
            part = getattr(default, name)
            changes[name] = _shrunk(type(part), part, more.get(name, {}), least).to_dict()
        elif name in _LAYERS and isinstance(value, int):
            changes[name] = min(value, layers)
        elif name in small and isinstance(value, int) and not isinstance(value, bool):
            changes[name] = min(value, small[name])
        elif isinstance(value, list) and count and len(value) == count:
            whole = name in small and all(isinstance(each, int) for each in value)
            changes[name] = [min(v, small[name]) if whole else v for v in value[:layers]]
        elif name == "per_layer_config" and value:
            changes[name] = {
                layer: {k: min(v, small[k]) if k in small else v for k, v in part.items()}
                for layer, part in value.items()
                if int(layer) < layers
            }
        elif name.endswith("token_id") and isinstance(value, int):
            changes[name] = value % 128
        else:
            changes[name] = value
    changes |= _EXTRA.get(cls.model_type, {})
    changes |= {k: v for k, v in more.items() if k not in default.sub_configs}
    return cls(**{k: v for k, v in changes.items() if k not in ("model_type", "architectures")})


def _enough_layers(fields: dict[str, Any], count: int) -> int:
    """Return how many layers it takes to have one of each kind, two at the least."""
    kinds = [v for v in fields.values() if isinstance(v, list) and len(v) == count and count]
    needed = 2
    for kind in kinds:
        named = [str(each) for each in kind]
        if len(set(named)) <= _KINDS:  # more are indices of layers, say
            needed = max(needed, *(named.index(each) + 1 for each in set(named)))
    return needed


def tiny_model(cls: Any) -> Any:
    """Return a random tiny model in evaluation mode, no bias or norm of it neutral.

    Raises:
        Exception: whatever its code raises where it cannot be built from its config alone.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(cls)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(1))
    found: torch.Tensor = model(input_ids=ids).logits
    return found


def packed(model: Any) -> float:
    """Pack samples as healing does; return how far what is said of them is from that of each alone.

    In standard deviations of the logits; the largest difference.
    """
    rows = [_row([7, 9, 5], 24, seed=2), _row([10, 4], 24, seed=3)]
    batch = (collate_apart if sees_neighbours(model) else collate)(rows)
    labels_NL = batch.pop("labels")
    if not takes_position_ids(model):
        del batch["position_ids"]
    with torch.no_grad():
        logits_NLV = model(**batch, use_cache=False).logits
        together_PV = logits_NLV[:, :-1][labels_NL[:, 1:] != -100]
        alone_PV = torch.cat(
            [model(ids_L[None], use_cache=False).logits[0, :-1] for ids_L in _samples(rows)]
        )
    return float((together_PV - alone_PV).abs().max() / alone_PV.std())


def is_causal(model: Any) -> bool:
    """Return whether what a model says of a token is the same whatever comes after it."""
    ids_NL = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        long, short = (model(ids, use_cache=False).logits for ids in (ids_NL, ids_NL[:, :7]))
    return float((long[:, :7] - short).abs().max() / short.std()) < 1e-4


def _row(lengths: list[int], capacity: int, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    row = {
        "input_ids": torch.zeros(capacity, dtype=torch.long),
        "labels": torch.full((capacity,), -100),
        "position_ids": torch.arange(capacity),
    }
    at = 0
    for length in lengths:
        here = slice(at, at + length)
        row["input_ids"][here] = torch.randint(3, 90, (length,), generator=draw)
        row["labels"][here] = row["input_ids"][here]
        row["labels"][at] = -100
        at += length
        row["position_ids"][at:] = torch.arange(capacity - at)
    return row


def _samples(rows: list[dict[str, torch.Tensor]]) -> Iterator[torch.Tensor]:
    for row in rows:
        begins = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), len(row["labels"])]
        for begin, end in itertools.pairwise(begins):
            if (row["labels"][begin:end] != -100).any():
                yield row["input_ids"][begin:end]


def round_trip(model: Any) -> None:
    """Slim a model, save and load it; the same logits must come out, and text.

    Raises:
        AssertionError: if something does not hold.
    """
    dense = logits(model)
    count = sum(p.numel() for p in model.parameters())
    planned = planning.plan(model, MLP_AND_ATTENTION)
    report = fitting.rewrite(model, planned)
    assert report.totals == planned.report().totals
    assert report.totals.params_before == count
    assert report.totals.params_after == sum(p.numel() for p in model.parameters()) < count
    assert not any(module.is_meta for module in model.parameters())
    slim = logits(model)
    assert not torch.allclose(slim, dense), "the blocks are not used"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert type(loaded) is type(model)
        ours, theirs = model.state_dict(), loaded.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        # Files are mapped into memory at other addresses: products may round otherwise.
        torch.testing.assert_close(logits(loaded), slim, rtol=1e-4, atol=1e-4)
        if loaded.can_generate():
            ids = torch.full((1, 4), 5)
            text = loaded.generate(ids, max_new_tokens=3, do_sample=False)
            assert text.shape[1] > 4


def fit_to_text(model: Any) -> None:
    """Fit every dense map in a model's decoder layers to token ids, and check what comes out.

    Raises:
        SlimError: if the model cannot be fitted.
        AssertionError: if something does not hold.
    """
    windows = torch.randint(3, 90, (6, 16), generator=torch.Generator().manual_seed(2))
    text = fitting.TokenWindows(windows[:4], windows[4:])
    dense, inside = logits(model), f"{find_layers(model).path}.*"
    rule = {"match": inside, "structure": "low_rank", "keep_ratio": 0.5}
    recipe = Recipe.of({"name": "fit", "init": "least_squares", "replace": [rule]})
    report = fitting.rewrite(model, planning.plan(model, recipe), calibration=text)
    errors = [row.init_error for row in report.rows if row.action == "replaced"]
    assert errors
    # Of what the text never reaches, nothing is measured.
    assert all(error is None or 0 <= error < 10 for error in errors)
    slim = logits(model)
    assert slim.isfinite().all()
    assert not torch.allclose(slim, dense), "the blocks are not used"


@torch.no_grad()
def walk(model: Any) -> None:
    """Run a model's decoder layers one by one; the last one's output must be the model's own.

    Raises:
        SlimError: if they cannot be run one by one.
        AssertionError: if something else comes out.
    """
    stack = list(model.get_submodule(find_layers(model).path))
    batches = list(torch.randint(3, 90, (2, 1, 16), generator=torch.Generator().manual_seed(1)))
    calls = record_calls(model, stack, batches)
    ends: list[Any] = []
    handle = stack[-1].register_forward_hook(lambda _module, _args, output: ends.append(output))
    for batch in batches:
        model(input_ids=batch, use_cache=False)
    handle.remove()
    for n, end in enumerate(ends):
        hidden = calls.hidden[n]
        for layer, extras in zip(stack, calls.extras, strict=True):
            hidden = run_layer(layer, hidden, extras[n])[0]
        torch.testing.assert_close(hidden, end if isinstance(end, torch.Tensor) else end[0])


def widen(model: Any) -> list[Mlp]:
    """Double every MLP that is found; the model must compute what it did. Return them.

    Raises:
        AssertionError: if it does not: something beside their projections has to do with neurons.
    """
    dense = logits(model)
    found = find_mlps(model, find_layers(model))
    for mlp in found:
        resize_mlp(model, mlp, 2 * mlp.width)
    torch.testing.assert_close(logits(model), dense, rtol=1e-3, atol=1e-4)
    return found
