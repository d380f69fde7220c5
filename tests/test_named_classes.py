"""A slim model's classes have names: they can be imported, pickled and found by other processes."""

from __future__ import annotations

import io
import json
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import logits, tiny_config, tiny_model, tokens
from torch import multiprocessing
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    InternLM3Config,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

import llmslim
from llmslim.modeling.checkpoint_code import OLDEST

RULES = [
    {"match": "*.mlp.*", "structure": "low_rank", "rank": 6},
    {"match": "*.self_attn.*", "structure": "grouped_pointwise", "groups": 4},
]


def slim_model(architecture: str = "llama", **more: Any) -> Any:
    model = tiny_model(architecture)
    llmslim.slim(model, {"name": "both", "init": "project", "replace": RULES, **more})
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("slim") / "model"
    slim_model().save_pretrained(path)
    return path


def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        states: torch.Tensor = model(input_ids=tokens()).last_hidden_state
    return states


def test_the_bare_model_and_the_classifier_have_the_blocks_too(folder: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder)
    bare = AutoModel.from_pretrained(folder)
    judge = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    for model, base in (
        (whole, LlamaForCausalLM),
        (bare, LlamaModel),
        (judge, LlamaForSequenceClassification),
    ):
        assert isinstance(model, base)
        assert type(model).__name__ == f"Slim{base.__name__}"
    assert judge(input_ids=tokens()).logits.shape == (2, 3)
    for model in (bare, judge.model):
        assert torch.equal(hidden(model), hidden(whole.model))


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_they_can_be_saved_and_loaded_themselves(auto: Any, folder: Path, tmp_path: Path) -> None:
    model = auto.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(a, again.state_dict()[k]) for k, a in model.state_dict().items())


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_a_block_that_is_missing_is_missed_by_all(auto: Any, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.down.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"missing weights.*layers\.1\.mlp\.up_proj\.down"):
        auto.from_pretrained(tmp_path)


@pytest.mark.parametrize("architecture", ["gpt2", "diffllama"])
def test_layers_that_are_left_are_left_in_the_bare_model_too(
    architecture: str, tmp_path: Path
) -> None:
    """DiffLlama's layers depend on their index, and its classifier is built around AutoModel."""
    torch.manual_seed(0)
    config = tiny_config("llama").to_dict()
    whole = (
        tiny_model("gpt2")
        if architecture == "gpt2"
        else DiffLlamaForCausalLM(DiffLlamaConfig(**{**config, "model_type": "diffllama"}))
    ).eval()
    rules = [{**RULES[0], "match": "*mlp*"}]
    spec = {"name": "few", "init": "project", "depth": {"keep_layers": [0, 3]}, "replace": rules}
    llmslim.slim(whole, spec)
    whole.save_pretrained(tmp_path)
    assert ("depth" in whole.config.llmslim) == (architecture == "diffllama")
    assert torch.equal(hidden(AutoModel.from_pretrained(tmp_path)), hidden(whole.base_model))
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(hidden(judge.base_model), hidden(whole.base_model))


def test_a_type_with_a_config_of_its_own_for_the_models_of_another(tmp_path: Path) -> None:
    """InternLM3's models are Llama's; the Llama of a Llama stays what it is."""
    sizes = {**tiny_config("llama").to_dict(), "model_type": "internlm3"}
    whole = AutoModelForCausalLM.from_config(InternLM3Config(**sizes))
    llmslim.slim(whole, {"name": "both", "init": "project", "replace": [RULES[0]]})
    whole.save_pretrained(tmp_path)
    entry = (tmp_path / "llmslim_entry.py").read_text()
    assert "\nclass SlimInternLM3Config(InternLM3Config):" in entry
    assert "LlamaConfig" not in entry
    for auto in (AutoModelForCausalLM, AutoModel):
        loaded = auto.from_pretrained(tmp_path)
        assert isinstance(loaded.config, InternLM3Config)
        assert type(loaded).config_class is type(loaded.config)
        assert type(pickle.loads(pickle.dumps(loaded))) is type(loaded)
    assert torch.equal(hidden(loaded), hidden(whole.eval().model))
    assert slim_model().config_class is not type(whole.config)


def test_pickled_and_saved_whole(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert type(again.config) is type(AutoConfig.from_pretrained(folder))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(
        logits(torch.load(file, weights_only=False), tokens()), logits(model, tokens())
    )


def _sent(model: Any, ids: torch.Tensor, answers: Any) -> None:
    answers.put((type(model).__name__, logits(model, ids).tolist()))


@pytest.mark.slow  # a process that imports torch and transformers anew
def test_sent_to_a_process_that_knows_nothing(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=_sent, args=(model, tokens(), answers))
    worker.start()
    name, values = answers.get(timeout=300)
    worker.join()
    assert name == "SlimLlamaForCausalLM"
    torch.testing.assert_close(torch.tensor(values), logits(model, tokens()))


WITHOUT = """
    import sys
    sys.modules["llmslim"] = None
    import pickle, torch, transformers
    path = sys.argv[1]
    found = []
    for auto in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        model = getattr(transformers, auto).from_pretrained(path, trust_remote_code=True).eval()
        again = pickle.loads(pickle.dumps(model))
        assert type(again) is type(model)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
        found.append(type(model).__name__)
    print(*found, type(model).__module__.rpartition(".")[2])
"""


def test_the_entry_file_has_them_where_llmslim_is_not_installed(
    folder: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WITHOUT), str(folder)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.split() == [
        *("SlimLlamaModel", "SlimLlamaForCausalLM", "SlimLlamaForSequenceClassification"),
        "llmslim_entry",
    ], done.stderr[-2000:]


def test_each_auto_class_is_reported_its_class(folder: Path) -> None:
    named = json.loads((folder / "config.json").read_text())["auto_map"]
    assert named == {
        "AutoConfig": "llmslim_entry.SlimLlamaConfig",
        "AutoModel": "llmslim_entry.SlimLlamaModel",
        "AutoModelForCausalLM": "llmslim_entry.SlimLlamaForCausalLM",
        "AutoModelForSequenceClassification": "llmslim_entry.SlimLlamaForSequenceClassification",
    }


def test_an_old_transformers_is_reported_what_is_needed(folder: Path) -> None:
    code = (folder / "llmslim_entry.py").read_text()
    old = type(sys)("transformers")
    old.__version__ = "4.57.1"  # type: ignore[attr-defined]
    known = sys.modules["transformers"]
    sys.modules["transformers"] = old
    try:
        with pytest.raises(ImportError, match=r"transformers 5\.19 or newer.*4\.57\.1"):
            exec(compile(code, "llmslim_entry.py", "exec"), {})
    finally:
        sys.modules["transformers"] = known


def test_the_oldest_transformers_is_the_one_that_the_package_asks_for() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    found = re.search(r'"transformers>=(\d+)\.(\d+)"', project)
    assert found is not None
    assert tuple(map(int, found.groups())) == OLDEST
