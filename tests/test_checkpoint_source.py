"""Finding and loading models: what comes in is what the files hold, or one clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx2 as httpx
import huggingface_hub
import pytest
import torch
from helpers_checkpoint import (
    TEMPLATE,
    edit_json,
    make_slim,
    same_bytes,
    slim_llama,
    stored,
    tiny_tokenizer,
)
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tiny import logits, tiny_model, tokens
from transformers import GenerationConfig, LlamaForCausalLM, Phi3Config
from transformers.utils import logging

from llmslim.errors import CheckpointError
from llmslim.storage import load_model, load_tokenizer, open_source, quiet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dense Llama in two shards and more, as transformers writes it."""
    path = tmp_path / "llama"
    with quiet():
        tiny_model("llama").save_pretrained(path, max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def load(path: Path | str, **options: Any) -> Any:
    return load_model(open_source(path), **options)


def refused(path: Path | str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(open_source(path, **options))
    assert len(caught.value.problems) == 1
    return str(caught.value)


def test_a_sharded_folder_loads_to_the_bytes_of_its_files(folder: Path) -> None:
    source = open_source(folder)
    assert (source.given, source.path, source.gguf_file) == (str(folder), folder, None)
    assert source.name == "llama"
    assert source.config.model_type == "llama"
    assert not source.is_kphi3
    model = load_model(source)
    assert type(model) is LlamaForCausalLM
    assert not model.training
    files, state = stored(folder), model.state_dict()
    assert files.keys() == state.keys()
    assert all(same_bytes(files[name], state[name]) for name in files)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_files_own_type_is_kept_whatever_the_config_says(tmp_path: Path, dtype: str) -> None:
    with quiet():
        tiny_model("llama").to(getattr(torch, dtype)).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", dtype="float16" if dtype == "float32" else "float32")
    state = load(tmp_path).state_dict()
    assert all(same_bytes(tensor, state[name]) for name, tensor in stored(tmp_path).items())


def test_a_type_can_be_asked_for(folder: Path) -> None:
    model = load(folder, dtype="bfloat16")
    name = "model.layers.0.mlp.up_proj.weight"
    assert same_bytes(model.state_dict()[name], stored(folder)[name].bfloat16())
    with pytest.raises(CheckpointError, match=r"^dtype: 'int8'; .* float32, bfloat16, float16"):
        load(folder, dtype="int8")


def test_weights_of_several_types_lose_nothing(tmp_path: Path) -> None:
    with quiet():
        tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if "mlp" in name:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    edit_json(tmp_path / "config.json", dtype="bfloat16")
    state = load(tmp_path).state_dict()
    assert all(torch.equal(t.float(), state[name].float()) for name, t in tensors.items())


def test_a_wide_leftover_buffer_does_not_widen_the_model(tmp_path: Path) -> None:
    with quiet():
        tiny_model("llama").half().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load(tmp_path).dtype == torch.float16


def test_tied_weights_stay_one_tensor(tmp_path: Path) -> None:
    with quiet():
        tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in stored(tmp_path)
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_generation_config_travels(folder: Path) -> None:
    GenerationConfig(max_new_tokens=17, top_k=3, do_sample=True).save_pretrained(folder)
    assert load(folder).generation_config.max_new_tokens == 17


def test_a_slim_folder_loads_as_what_it_is(tmp_path: Path) -> None:
    model = slim_llama()
    with quiet():
        model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("change", ["missing", "extra", "reshaped"])
def test_a_slim_folder_that_does_not_hold_exactly_its_weights(tmp_path: Path, change: str) -> None:
    with quiet():
        slim_llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    match change:
        case "missing":
            del tensors[name]
        case "extra":
            tensors[f"{name}2"] = torch.ones(1)
        case "reshaped":
            tensors[name] = torch.ones(2, 2, 2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    said = refused(tmp_path)
    assert str(tmp_path) in said
    assert "cannot be loaded" in said


def test_a_missing_weight_is_never_made_up(tmp_path: Path) -> None:
    with quiet():
        tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    said = refused(tmp_path)
    assert "1 weights of the model are missing" in said
    assert "model.layers.2.mlp.down_proj.weight" in said


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    with quiet():
        tiny_model("llama").save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", intermediate_size=64)
    assert str(tmp_path) in refused(tmp_path)


def test_a_truncated_shard_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard}: " in refused(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "config.json: not JSON"),
        ("", "config.json: not JSON"),
        ("[" * 100_000, "config.json: not JSON"),
        ("[]", "config.json: holds a list"),
        ("{}", "its config.json cannot be used"),
        ('{"model_type": "no_such_type"}', "its config.json cannot be used"),
        ('{"model_type": "llama", "num_hidden_layers": "many"}', "its config.json cannot be used"),
        ('{"model_type": "llmslim"}', "not a llmslim config"),
        (
            '{"model_type": "llmslim", "base_model_type": "llama", "llmslim": {"format": 99}}',
            "llmslim format 99; this version reads 1",
        ),
        (
            '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}',
            "its weights are quantised (gptq)",
        ),
        ('{"model_type": "t5"}', "cannot be loaded as a causal language model"),
        (
            '{"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}',
            "pass trust_remote_code=True",
        ),
    ],
)
def test_a_config_that_cannot_be_used(folder: Path, content: str, said: str) -> None:
    (folder / "config.json").write_text(content)
    (folder / "evil.py").write_text("raise SystemExit('this must not run')")
    assert said in refused(folder)


def test_code_beside_a_known_architecture_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('this must not run')")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_json(folder / "config.json", auto_map=auto_map)
    assert type(load(folder)) is LlamaForCausalLM


def test_config_alone_is_enough_to_plan_but_not_to_load(folder: Path, tmp_path: Path) -> None:
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(folder / "config.json", only)
    source = open_source(only, weights=False)
    assert source.config.to_json_string() == open_source(folder).config.to_json_string()
    assert "holds no weights" in refused(only)
    with pytest.raises(CheckpointError, match=r"only: .*model\.safetensors\.index\.json"):
        load_model(source)


def test_a_config_beside_a_gguf_is_enough_to_plan(folder: Path, tmp_path: Path) -> None:
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(folder / "config.json", only)
    (only / "vocabulary.gguf").write_bytes(b"no weights in here")
    source = open_source(only, weights=False)
    assert (source.gguf_file, source.config.model_type) == (None, "llama")
    assert "vocabulary.gguf: not a whole GGUF file" in refused(only)


def test_a_published_kphi3_is_recognised_and_its_code_not_run(tmp_path: Path) -> None:
    config = {
        "model_type": "kphi3",
        "auto_map": {"AutoConfig": "modeling_kphi3.KPhi3Config"},
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "vocab_size": 96,
        "pad_token_id": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_kphi3.py").write_text("raise SystemExit('this must not run')")
    source = open_source(tmp_path, weights=False)
    assert source.is_kphi3
    assert isinstance(source.config, Phi3Config)
    assert source.config.num_hidden_layers == 2


def test_what_is_no_model_at_all(tmp_path: Path) -> None:
    assert "has no config.json" in refused(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert "Give the folder that the file is in" in refused(file)
    for path in ("", " ", "./nowhere", "/no/such/folder", "a/b/c", "~/none/such"):
        assert "not a local folder or file, and not a name on the hub" in refused(path)


def test_the_hub_without_a_network_and_without_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> str:
        def download(*args: Any, **kwargs: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return refused("owner/model")

    start = "owner/model: not a local folder or file, and the hub "
    said = fail(LocalEntryNotFoundError("Got: ConnectError\nand much more"))
    assert said == f"{start}could not be reached (LocalEntryNotFoundError: Got: ConnectError)."
    assert fail(ConnectionError()).startswith(f"{start}could not be reached")
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    said = fail(RepositoryNotFoundError("404", response=response))
    assert said.startswith(f"{start}has no such model")


def test_a_hub_model_is_loaded_from_its_snapshot(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = open_source("owner/small-model")
    assert (asked["name"], source.path, source.name) == ("owner/small-model", folder, "small-model")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not {"*.py", "*.bin", "*"} & set(asked["allow_patterns"])
    open_source("owner/small-model", trust_remote_code=True, weights=False)
    assert "*.py" in asked["allow_patterns"]
    assert "*.safetensors" not in asked["allow_patterns"]


def test_the_tokenizer_and_its_chat_template(folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(open_source(folder)) is None
    tiny_tokenizer().save_pretrained(folder)
    for given in (open_source(folder), folder, str(folder)):
        tokenizer = load_tokenizer(given)
        assert tokenizer is not None
        assert tokenizer.chat_template == TEMPLATE
        assert tokenizer("a b")["input_ids"] == tiny_tokenizer()("a b")["input_ids"]
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"llama: .*JSONDecodeError"):
        load_tokenizer(folder)
    with pytest.raises(CheckpointError, match="nowhere: "):
        load_tokenizer(tmp_path / "nowhere")


def test_loading_prints_nothing_and_leaves_the_logs_as_they_were(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    try:
        tiny_tokenizer().save_pretrained(folder)
        capfd.readouterr()
        load(folder)
        load_tokenizer(folder)
        assert capfd.readouterr() == ("", "")
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
        assert huggingface_hub.utils.are_progress_bars_disabled()
    finally:
        logging.set_verbosity_warning()
        huggingface_hub.utils.enable_progress_bars()


def test_a_fused_model_with_biases_loads_back(tmp_path: Path) -> None:
    model = make_slim(
        tiny_model("gpt2"), {"mlp.c_fc": {"structure": "grouped_pointwise", "groups": 4}}
    )
    with quiet():
        model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    assert json.loads((tmp_path / "config.json").read_text())["base_model_type"] == "gpt2"
