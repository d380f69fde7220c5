"""Nothing is called written before what will be loaded computes what was made."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers_streaming import RECIPES, in_memory, stored_model
from six_layers import Subject
from tiny import logits, tiny_model, tokens

import llmslim
from llmslim import CheckpointError, api
from llmslim.anatomy import first_difference
from llmslim.conversion.proof import PieceRunner
from llmslim.storage import Pieces, open_source

_SAVE = tf.PreTrainedModel.save_pretrained
RANK_FOUR = {"match": "*.mlp.*", "structure": "low_rank", "rank": 4}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("field", ["rms_norm_eps", "hidden_act"])
def test_a_config_that_says_something_else(
    whole: bool, field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, shapes and bytes agree: only what is computed differs."""

    def save(self: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
        _SAVE(self, folder, *args, **kwargs)
        config = json.loads((Path(folder) / "config.json").read_text())
        config[field] = {"rms_norm_eps": 0.5, "hidden_act": "gelu"}[field]
        (Path(folder) / "config.json").write_text(json.dumps(config))

    model = stored_model(tmp_path / "m")
    monkeypatch.setattr(tf.PreTrainedModel, "save_pretrained", save)
    convert = partial(in_memory, monkeypatch) if whole else api.convert
    with pytest.raises(CheckpointError):
        convert(model, RECIPES["random"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_a_config_that_says_something_else_of_long_text_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces are run on few tokens: what they would do with more is read off the models."""

    def save(self: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
        self.config.sliding_window = 7
        _SAVE(self, folder, *args, **kwargs)
        self.config.sliding_window = 8

    tiny_model("mistral", num_hidden_layers=1).save_pretrained(tmp_path / "m")
    monkeypatch.setattr(tf.PreTrainedModel, "save_pretrained", save)
    with pytest.raises(CheckpointError, match="SlimMistralForCausalLM: config "):
        api.convert(tmp_path / "m", {"replace": [RANK_FOUR]}, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize("part", ["embed_tokens", "layers.2", "norm", "lm_head"])
def test_a_piece_that_loads_as_something_else(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the files is right, and becomes something else on loading."""
    real = Pieces.load

    def load(pieces: Pieces, piece: Any) -> None:
        real(pieces, piece)
        if pieces.source.path != model and piece.name.endswith(part):
            _, tensor = next(iter(pieces.tensors(piece)))
            tensor.copy_(tensor.clone().flip(0))

    model = stored_model(tmp_path / "m")
    monkeypatch.setattr(Pieces, "load", load)
    with pytest.raises(CheckpointError):
        api.convert(model, RECIPES["random"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_numbers_that_are_not_finite_are_equal_to_themselves(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "m")
    out = api.convert(tmp_path / "m", RECIPES["depth"], tmp_path / "out", allow_nonfinite=True)
    assert out.path.is_dir()


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"rms_norm_eps": 1e-3}, False),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, False),
        ({"attention_bias": True}, False),
        ({"hidden_act": "gelu"}, False),
        ({"intermediate_size": 100}, False),
    ],
)
def test_likeness(changes: dict[str, Any], same: bool) -> None:
    """What is found alike gives equal logits with equal weights, and what is not does not."""
    one, other = tiny_model("llama"), tiny_model("llama", **changes)
    assert (first_difference(one, other) == "") is same
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (one, other)]
    if shapes[0] == shapes[1]:
        other.load_state_dict(one.state_dict())
        assert torch.equal(logits(one, tokens()), logits(other, tokens())) is same


def test_layers_of_experts_are_run(tmp_path: Path) -> None:
    """Kernels for experts refuse weights without a place in memory, which the first layer had."""
    config = Subject("qwen3_moe", "causal", {"decoder_sparse_step": 2}).config()
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "dense")
    recipe = {"depth": {"keep_layers": [1, 2, 4]}}  # the first layer has experts now
    out = llmslim.convert(tmp_path / "dense", recipe, tmp_path / "out").path
    pieces = Pieces(open_source(out))
    runner = PieceRunner(pieces)
    for piece in pieces.all:
        pieces.load(piece)
        assert runner.fingerprint(piece), piece.name
    llmslim.slim(model, recipe)
    assert torch.equal(logits(llmslim.load(out), tokens()), logits(model, tokens()))


def test_layers_of_blocks_alone_are_run(tmp_path: Path) -> None:
    """Its encoder of sound has as many layers, and dense maps that read as many features."""
    model = Subject("phi4_multimodal", "causal").model()
    model.save_pretrained(tmp_path / "dense")
    inside = [f"model.layers.*.{part}" for part in ("self_attn.*", "mlp.*")]
    recipe = {"replace": [{"match": inside, "structure": "low_rank", "keep_ratio": 0.5}]}
    out = llmslim.convert(tmp_path / "dense", recipe, tmp_path / "out").path
    llmslim.slim(model, recipe)
    assert torch.equal(logits(llmslim.load(out), tokens()), logits(model, tokens()))


def test_layers_inside_a_module_with_a_parameter_of_its_own_are_run(tmp_path: Path) -> None:
    """What separates DeepSeek-OCR's images belongs to the module that holds all layers."""
    model = Subject("deepseek_ocr2", "image").model()
    model.save_pretrained(tmp_path / "dense")
    recipe = {"depth": {"keep_layers": [1, 2, 4]}}  # the first layer has experts now
    out = llmslim.convert(tmp_path / "dense", recipe, tmp_path / "out").path
    llmslim.slim(model, recipe)
    assert torch.equal(logits(llmslim.load(out), tokens()), logits(model, tokens()))
