"""Layers that stay compute what they did, in memory and from disk, whatever depends on them."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from six_layers import Subject
from tiny import few, logits, tiny_model, tokens
from torch import nn

import llmslim
from llmslim import CheckpointError, TargetError
from llmslim.modeling.depth import drop_layers

_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_MIXED = ["sliding_attention", "full_attention"] * 3


def _configs() -> dict[str, tuple[Any, bool]]:
    """Return configs whose layers depend on their place, and whether a plain config can say so."""
    mamba = {"mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False}
    return {
        "gpt2": (
            tf.GPT2Config(
                n_embd=48, n_layer=6, n_head=4, vocab_size=96, n_positions=64,
                scale_attn_by_inverse_layer_idx=True,
            ),
            False,
        ),
        "diffllama": (tf.DiffLlamaConfig(**_SIZES, num_key_value_heads=2), False),
        "minicpm3": (tf.MiniCPM3Config(**_SIZES, **_MLA), False),
        "deepseek_v3": (
            tf.DeepseekV3Config(
                **_SIZES, **_EXPERTS, **_MLA, n_routed_experts=4, n_shared_experts=1,
                first_k_dense_replace=2, n_group=2, topk_group=1,
            ),
            True,
        ),
        "qwen3_moe, a list": (
            tf.Qwen3MoeConfig(
                **_SIZES, **_EXPERTS, num_key_value_heads=2, num_experts=4, head_dim=12,
                mlp_only_layers=[0, 3],
            ),
            True,
        ),
        "qwen3_moe, a period": (
            tf.Qwen3MoeConfig(
                **_SIZES, **_EXPERTS, num_key_value_heads=2, num_experts=4, head_dim=12,
                decoder_sparse_step=2,
            ),
            False,
        ),
        "jamba": (
            tf.JambaConfig(
                **_SIZES, **mamba, num_key_value_heads=2, attn_layer_period=3, attn_layer_offset=0,
                expert_layer_period=2, num_experts=2, num_experts_per_tok=1,
            ),
            False,
        ),
        "gemma3": (
            tf.Gemma3TextConfig(
                **_SIZES, num_key_value_heads=2, head_dim=12, sliding_window=4, layer_types=_MIXED
            ),
            True,
        ),
        "recurrent_gemma": (
            tf.RecurrentGemmaConfig(
                **_SIZES, num_key_value_heads=1, lru_width=48, attention_window_size=4,
                block_types=["recurrent", "recurrent", "attention"],
            ),
            False,
        ),
        "bart": (
            tf.BartConfig(
                vocab_size=96, d_model=48, encoder_layers=6, decoder_layers=6,
                encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
                decoder_ffn_dim=96, max_position_embeddings=64, is_decoder=True,
                is_encoder_decoder=False, pad_token_id=0,
            ),
            True,
        ),
    }  # fmt: skip


KEEP = [0, 2, 3, 5]
RECIPE = {"name": "d", "depth": {"keep_layers": KEEP}}


def _model(name: str) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(_configs()[name][0]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def _skipping(model: Any, keep: list[int]) -> torch.Tensor:
    """Return the logits of a dense model whose other layers let the hidden states through."""
    stack = next(
        m
        for m in model.get_decoder().modules()
        if isinstance(m, torch.nn.ModuleList) and len(m) == 6
    )
    for index, layer in enumerate(stack):
        if index not in keep:
            layer.register_forward_hook(_through, with_kwargs=True)
    return logits(model, tokens())


def _through(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@pytest.mark.parametrize("name", _configs())
def test_layers_compute_what_they_did(name: str) -> None:
    model = _model(name)
    expected = _skipping(_model(name), KEEP)
    llmslim.slim(model, RECIPE)
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-5)
    assert ("llmslim" not in model.config.to_dict()) == _configs()[name][1]


# A record of places, a plain config, layers of several kinds.
@pytest.mark.parametrize("name", few(_configs(), ("gpt2", "gemma3", "jamba")))
def test_layers_compute_what_they_did_when_loaded(name: str, tmp_path: Path) -> None:
    model = _model(name)
    model.save_pretrained(tmp_path / "dense")
    llmslim.slim(model, RECIPE)
    model.save_pretrained(tmp_path / "saved")
    converted = llmslim.convert(tmp_path / "dense", RECIPE, tmp_path / "converted").path
    for folder in (tmp_path / "saved", converted):
        again = llmslim.load(folder)
        torch.testing.assert_close(
            logits(again, tokens()), logits(model, tokens()), rtol=0, atol=1e-6
        )
    _check_cache(again)


def _check_cache(model: Any) -> None:
    """Generating with a cache, whose kinds of layers the config tells, changes nothing."""
    ids = tokens(1, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(
        model.generate(ids, use_cache=True, **options),
        model.generate(ids, use_cache=False, **options),
    )


@pytest.mark.parametrize(("keep", "caches"), [([0, 3], False), ([0, 2], True)])
def test_layers_that_cannot_fill_a_cache(keep: list[int], caches: bool) -> None:
    """Without attention, the cache of transformers cannot say how long it is."""
    model = _model("recurrent_gemma")
    expected = _skipping(_model("recurrent_gemma"), keep)
    report = llmslim.slim(model, {"depth": {"keep_layers": keep}})
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-5)
    assert any("use_cache=False" in note for note in report.problems) is not caches
    with nullcontext() if caches else pytest.raises(ValueError, match="LinearAttention"):
        model.generate(tokens(1, 5), max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize(("name", "stored"), [("diffllama", True), ("recurrent_gemma", False)])
def test_fewer_layers_twice(name: str, stored: bool, tmp_path: Path) -> None:
    """The record is of the original, however often layers were dropped."""
    model = _model(name)
    expected = _skipping(_model(name), [2, 4])
    llmslim.slim(model, {"depth": {"keep_layers": [0, 2, 3, 4]}})
    if stored:
        model.save_pretrained(tmp_path / "first")
        model = llmslim.load(tmp_path / "first")
    llmslim.slim(model, {"depth": {"keep_layers": [1, 3]}})
    assert model.config.llmslim["depth"]["keep"] == [2, 4]
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(llmslim.load(tmp_path), tokens()), logits(model, tokens()))


def test_blocks_in_layers_at_other_places(tmp_path: Path) -> None:
    recipe = {
        "name": "d",
        "depth": {"keep_layers": [1, 4]},
        "replace": [{"match": "*.mlp.*", "structure": "low_rank", "rank": 8}],
    }
    model = _model("minicpm3")
    model.save_pretrained(tmp_path / "dense")
    llmslim.slim(model, recipe)
    again = llmslim.load(llmslim.convert(tmp_path / "dense", recipe, tmp_path / "out").path)
    torch.testing.assert_close(logits(again, tokens()), logits(model, tokens()), rtol=0, atol=1e-5)
    llmslim.slim(again, {"replace": [{"match": "*.q_a_proj", "structure": "low_rank", "rank": 4}]})
    again.save_pretrained(tmp_path / "more")
    more = llmslim.load(tmp_path / "more")
    assert torch.equal(logits(more, tokens()), logits(again, tokens()))


@pytest.mark.parametrize(
    ("config", "keep"),
    [
        # A norm that layer 0 alone has; it runs by its index.
        (tf.RwkvConfig(vocab_size=96, hidden_size=48, num_hidden_layers=4), [1, 2]),
        # Lists of modules beside the list of layers.
        (tf.XLMConfig(vocab_size=96, emb_dim=48, n_layers=4, n_heads=4), [0, 2]),
        # Its last layers read keys and values of others.
        (
            tf.Gemma3nTextConfig(
                **(_SIZES | {"intermediate_size": [96] * 6}), num_key_value_heads=2, head_dim=12,
                vocab_size_per_layer_input=96, hidden_size_per_layer_input=8, laurel_rank=8,
                num_kv_shared_layers=2, layer_types=_MIXED,
                activation_sparsity_pattern=[0.0] * 6,
            ),
            [0, 5],
        ),
        # Rotary frequencies by kinds of layers, one of which is gone.
        (Subject("gemma4_unified", "causal").config(), [1, 2, 4]),
    ],
    ids=lambda given: getattr(given, "model_type", ""),
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_before_any_work(config: Any, keep: list[int]) -> None:
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for verb in (llmslim.plan, llmslim.slim):
        with pytest.raises(TargetError):
            verb(model, {"depth": {"keep_layers": keep}})
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose config has a record of the layers that were dropped."""
    path, model = tmp_path_factory.mktemp("recorded"), _model("diffllama")
    llmslim.slim(model, {"depth": {"keep_layers": [1, 2]}})
    model.save_pretrained(path)
    return path


def test_a_record_has_no_ordinary_form(tmp_path: Path) -> None:
    model = _model("diffllama")
    llmslim.slim(model, {"depth": {"keep_layers": [1, 2]}})
    with pytest.raises(CheckpointError):
        llmslim.export_dense(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"keep": [1, 9]},
        {"keep": ["1", "2"]},
        {"stack": "model.nothing"},
        {"original": {"no_such_field": 3}},
        {"kept": None},
        {"attributes": {"model": {"forward": "x"}}},
        {"attributes": {"model": {"_modules": {}}}},
    ],
)
def test_a_damaged_record(damage: dict[str, Any], recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["llmslim"]["depth"] |= damage
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        llmslim.load(tmp_path)


def test_a_plain_result_has_no_trace_of_llmslim(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    llmslim.slim(model, {"depth": {"keep_layers": [3, 1]}})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("qwen3", 2)
    assert not list(tmp_path.glob("*.py"))


def test_a_layer_that_reads_from_another_keeps_it() -> None:
    def model() -> Any:
        layers = nn.ModuleList(nn.Identity() for _ in range(4))
        for index, layer in enumerate(layers):
            layer.layer_idx = index
        layers[3].kv_layer_idx = 1
        return nn.ModuleDict({"layers": layers})

    kept = model()
    drop_layers(kept, "layers", [1, 2, 3])
    assert [layer.layer_idx for layer in kept["layers"]] == [0, 1, 2]
    assert kept["layers"][2].kv_layer_idx == 0
    with pytest.raises(ValueError, match=r"3 .* 1"):
        drop_layers(model(), "layers", [0, 2, 3])
