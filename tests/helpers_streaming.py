"""What the streaming tests share: models on disk, recipes, both ways of converting."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers_checkpoint import hashes, stored
from tiny import tiny_model

from llmslim import api
from llmslim.storage import NotInPiecesError

GROUPED = {"match": "*mlp*", "structure": "grouped_pointwise", "groups": 4}
LOW_RANK = {"match": "*mlp*", "structure": "low_rank", "rank": 4}
RECIPES: dict[str, dict[str, Any]] = {
    "random": {"name": "r", "replace": [GROUPED]},
    "project": {"name": "p", "init": "project", "replace": [LOW_RANK]},
    "depth": {"name": "d", "depth": {"keep_layers": [0, 3, 2]}},
}
CANNOT = {
    **dict.fromkeys(("emu3", "mllama"), "saved as their text part, which has no Auto class"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "no tiny config"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "no tiny config"),
    "gemma3n": "needs timm",
}
"""Architectures that the tests of all of them leave out."""
SMALL_SHARDS = {"max_shard_size": "30KB"}


def mixtral(num_hidden_layers: int = 4) -> Any:
    """Return a tiny model whose experts are stored one by one and loaded as one tensor."""
    config = tf.MixtralConfig(
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        num_local_experts=4,
    )
    return tf.MixtralForCausalLM(config)


def stored_model(folder: Path, architecture: str = "llama", **changes: Any) -> Path:
    """Write a tiny model."""
    model = mixtral() if architecture == "mixtral" else tiny_model(architecture, **changes)
    model.save_pretrained(folder)
    return folder


def in_memory(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> Any:
    """Convert as if the model could not be loaded in pieces."""

    def refuse(*args: Any, **options: Any) -> None:
        raise NotInPiecesError("for the sake of a test")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["llmslim.conversion.convert"], "Pieces", refuse)
        return api.convert(*args, **options)


def contents(folder: Path) -> dict[str, Any]:
    """Return hashes of all files but those below, what the report says, and the tensors' bytes.

    How tensors are shared out among files, and with it the manifest, may differ.
    """
    found = {k: v for k, v in hashes(folder).items() if not k.startswith("model")}
    report = json.loads((folder / "llmslim_report.json").read_text())
    del found["llmslim_manifest.json"], report["problems"]
    tensors = {
        name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in stored(folder).items()
    }
    return {**found, "llmslim_report.json": report, "tensors": tensors}
