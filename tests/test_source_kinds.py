"""What is no language model, or lies in the hub's cache: named, or read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers_checkpoint import tiny_tokenizer
from helpers_cli import run
from safetensors.torch import save_file
from tiny import tiny_model

import llmslim
from llmslim.errors import CheckpointError
from llmslim.storage import open_source, quiet

RECIPE = {"name": "r", "replace": [{"match": "*.mlp.*", "structure": "low_rank", "rank": 8}]}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 96, "pad_token_id": 0,
}  # fmt: skip


def adapter(folder: Path) -> Path:
    folder.mkdir()
    reported = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (folder / "adapter_config.json").write_text(json.dumps(reported))
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    return folder


def saved(model: Any, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    return folder


def kinds(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return folders that hold no language model, and what must be said of each."""
    config = tf.LlamaConfig(**SIZES)
    classifier = tf.LlamaForSequenceClassification(config)
    return {
        "adapter": (adapter(folder / "adapter"), "owner/base"),
        "base": (saved(tf.LlamaModel(config), folder / "base"), "LlamaModel"),
        "reward": (saved(classifier, folder / "reward"), "LlamaForSequenceClassification"),
    }


@pytest.mark.parametrize("kind", ["adapter", "base", "reward"])
def test_each_command_says_what_it_was_given(kind: str, tmp_path: Path) -> None:
    folder, named = kinds(tmp_path)[kind]
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE))
    recipe, out = ["-r", str(tmp_path / "r.yaml")], ["-o", str(tmp_path / "out")]
    (tmp_path / "t.txt").write_text("a b c")
    commands = [
        ["convert", str(folder), *recipe, *out],
        ["plan", str(folder), *recipe],
        ["heal", str(folder), "--data", str(tmp_path / "t.txt"), *out],
        ["generate", str(folder), "hello"],
        ["export", str(folder), "--dense", *out],
        ["verify", str(folder)],
    ]
    for command in commands:
        result = run(*command)
        assert result.exit_code == 1, command
        error = result.stderr.strip()
        assert error.startswith("Error: "), command
        assert command[0] == "verify" or named in error
    assert not (tmp_path / "out").exists()


def test_a_class_that_loads_a_pickle_is_refused_before_any_work(tmp_path: Path) -> None:
    config = tf.Qwen2_5OmniConfig(architectures=["Qwen2_5OmniForConditionalGeneration"])
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="spk_dict"):
        llmslim.plan(tmp_path, RECIPE)
    config.architectures = ["Qwen2_5OmniThinkerForConditionalGeneration"]
    thinker = config.thinker_config
    thinker.architectures = config.architectures
    thinker.save_pretrained(tmp_path)
    assert open_source(tmp_path, weights=False).config.model_type == "qwen2_5_omni_thinker"


def test_a_base_class_whose_head_is_there_is_a_language_model(tmp_path: Path) -> None:
    for tied in (True, False):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=tied))
        folder = saved(model, tmp_path / str(tied))
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = ["LlamaModel"]
        (folder / "config.json").write_text(json.dumps(config))
        assert type(llmslim.load(folder)) is tf.LlamaForCausalLM


def in_the_hub_cache(folder: Path, place: str) -> Path:
    """Put a model into a snapshot as the hub's client does: links to blobs beside it."""
    dense = saved(tiny_model("llama"), folder / "dense")
    root = folder / "hub" / "models--owner--name"
    target = root / "snapshots" / "0123abc" / place
    target.mkdir(parents=True)
    (root / "blobs").mkdir()
    for path in dense.iterdir():
        blob = root / "blobs" / f"{path.name}.blob"
        shutil.copy(path, blob)
        (target / path.name).symlink_to(os.path.relpath(blob, target))
    return target


@pytest.mark.parametrize(
    ("place", "name"), [("", "name"), ("sub", "name-sub"), ("a/b", "name-a-b")]
)
def test_a_folder_in_a_snapshot_is_read(place: str, name: str, tmp_path: Path) -> None:
    folder = in_the_hub_cache(tmp_path, place)
    assert open_source(folder).name == name
    result = llmslim.convert(folder, RECIPE, tmp_path / "out")
    assert llmslim.verify(result.path).ok
    assert not any(path.is_symlink() for path in result.path.iterdir())


def test_a_link_out_of_the_repository_is_still_refused(tmp_path: Path) -> None:
    folder = in_the_hub_cache(tmp_path, "sub")
    (tmp_path / "hub" / "models--other").mkdir()
    secret = tmp_path / "hub" / "models--other" / "secret.json"
    secret.write_text("{}")
    (folder / "extra.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"extra\.json"):
        open_source(folder)


def test_snapshots_elsewhere_are_no_cache(tmp_path: Path) -> None:
    folder = in_the_hub_cache(tmp_path, "sub")
    root = tmp_path / "hub" / "models--owner--name"
    root.rename(tmp_path / "hub" / "mine")
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}\S+: "):
        open_source(tmp_path / "hub" / "mine" / folder.relative_to(root))


CODE = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}


def with_code(folder: Path, name: str, auto_map: dict[str, Any]) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, "auto_map": auto_map}))


@pytest.mark.parametrize("recipe", [RECIPE, {"name": "d", "depth": {"keep_layers": 2}}])
def test_code_of_the_source_is_not_named_where_it_is_not(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    dense = saved(tiny_model("llama"), tmp_path / "dense")
    for module in ("configuration_x", "modeling_x"):
        (dense / f"{module}.py").write_text("raise SystemExit('this must not run')")
    with_code(dense, "config.json", {**CODE, "AutoModel": "owner/repo--modeling_x.M"})
    out = llmslim.convert(dense, recipe, tmp_path / "out").path
    for named in json.loads((out / "config.json").read_text()).get("auto_map", {}).values():
        assert named.startswith("llmslim_entry.")
    for trust in (False, True):
        tf.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=trust)
    if recipe is RECIPE:
        exported = llmslim.export_dense(out, tmp_path / "exported")
        assert "auto_map" not in json.loads((exported / "config.json").read_text())


def test_code_of_a_processor_travels_where_it_is_there(tmp_path: Path) -> None:
    dense = saved(tiny_model("llama"), tmp_path / "dense")
    with quiet():
        tiny_tokenizer().save_pretrained(dense)
    (dense / "image_x.py").write_text("raise SystemExit('this must not run')")
    with_code(dense, "preprocessor_config.json", {"AutoImageProcessor": "image_x.P"})
    with_code(dense, "processor_config.json", {"AutoProcessor": "gone_x.P"})
    with_code(dense, "tokenizer_config.json", {"AutoTokenizer": ["gone_x.T", None]})
    out = llmslim.convert(dense, RECIPE, tmp_path / "out").path
    assert (out / "image_x.py").read_bytes() == (dense / "image_x.py").read_bytes()
    kept = json.loads((out / "preprocessor_config.json").read_text())
    assert kept["auto_map"] == {"AutoImageProcessor": "image_x.P"}
    for name in ("processor_config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((out / name).read_text())


MODELING = """
from transformers import LlamaForCausalLM
class M(LlamaForCausalLM):
    pass
"""


@pytest.mark.usefixtures("no_remote_code")
def test_code_that_was_trusted_travels(tmp_path: Path) -> None:
    dense = saved(tiny_model("llama"), tmp_path / "dense")
    (dense / "modeling_x.py").write_text(MODELING)
    with_code(dense, "config.json", {"AutoModelForCausalLM": "modeling_x.M"})
    recipe = {"name": "d", "depth": {"keep_layers": 2}}
    out = llmslim.convert(dense, recipe, tmp_path / "out", trust_remote_code=True).path
    named = json.loads((out / "config.json").read_text())["auto_map"]
    assert named == {"AutoModelForCausalLM": "modeling_x.M"}
    assert (out / "modeling_x.py").exists()
    again = tf.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(again).__name__ == "M"


@pytest.mark.parametrize("training", [None, {"steps": 1}])
def test_a_model_that_overflows_by_itself_is_reported(training: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=64)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(2e4)
        model.model.layers[2].mlp.up_proj.weight.mul_(2e3)
    model = model.half()
    assert not model(torch.arange(1, 17)[None]).logits.isfinite().all()
    dense = saved(model, tmp_path / "dense")
    with quiet():
        tiny_tokenizer().save_pretrained(dense)
    (tmp_path / "t.txt").write_text("The quick brown fox jumps. " * 60)
    recipe = {
        **RECIPE,
        "init": "least_squares",
        "refine": {"steps": 2, "end_to_end": training},
    }
    text = {"calibration": str(tmp_path / "t.txt"), "calibration_tokens": 512}
    for dtype, reported in ((None, 1), ("float32", 0)):
        out = tmp_path / f"{dtype}"
        report = llmslim.convert(dense, recipe, out, dtype=dtype, **text).report
        assert sum("not finite in float16" in problem for problem in report.problems) == reported
