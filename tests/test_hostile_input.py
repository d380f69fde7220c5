"""Files made to deceive: none runs or fetches code, fills the memory, or passes for a model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers_checkpoint import edit_json, names, refused, tiny_tokenizer
from safetensors.torch import save_file
from tiny import tiny_model

from llmslim import api
from llmslim.cli.main import cli
from llmslim.errors import RecipeError
from llmslim.modeling.sizes import common_divisors
from llmslim.recipe import Recipe
from llmslim.storage import load_model, open_source, quiet, verify_folder
from llmslim.storage.config import check_config
from llmslim.storage.safetensors_io import read_json

RULE = {"match": "*.mlp.*", "structure": "grouped_pointwise", "groups": 4}
RECIPE = {"name": "small", "replace": [RULE]}
EVIL = "raise SystemExit('this must not run')"


def planned(path: Path) -> str:
    return refused(api.plan, path, RECIPE)


# ----------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 10**12},
        {"hidden_size": 10**5000 if sys.get_int_max_str_digits() > 5000 else 10**4000},
        {"num_hidden_layers": 10**9},
        {"num_labels": 10**10},
        {"vocab_size": 10**12},
        {"vision_config": {"num_hidden_layers": 10**9}},
        {"sub": [{"n_layer": 10**9}]},
        {"depths": [2, 10**9]},
    ],
)
def test_a_number_beyond_all_models_is_refused_at_once(
    folder: Path, change: dict[str, Any]
) -> None:
    edit_json(folder / "config.json", **change)
    start = time.monotonic()
    assert "allowed at most" in planned(folder)
    assert "allowed at most" in refused(open_source, folder)
    assert time.monotonic() - start < 2


def test_a_model_far_larger_than_its_files_takes_no_memory(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_size=2_400_000)  # 50 TB
    said = refused(load_model, open_source(folder))
    assert "describes a model of" in said
    assert "its files hold" in said


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"hidden_size": -48},
        {"hidden_size": 4_000_000_000, "intermediate_size": 4_000_000_000},
        {"hidden_act": "no_such_function"},
        {"rope_parameters": {"rope_type": "no_such_type"}},
        {"vocab_size": "many"},
        {"rms_norm_eps": []},
        {"rope_scaling": 7},
        {"model_type": ["llama"]},
    ],
)
def test_values_that_make_no_model_are_one_sentence(folder: Path, change: dict[str, Any]) -> None:
    edit_json(folder / "config.json", **change)
    assert planned(folder).startswith(str(folder))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 10**12},
        {"num_hidden_layers": 10**9},
        {"rope_theta": 10**30},
        {"rope_scaling": {"type": 5}},
        {"pad_token_id": "x"},
        {"hidden_act": 5},
    ],
)
def test_a_kphi3_config_is_held_to_the_same(tmp_path: Path, change: dict[str, Any]) -> None:
    sizes = {"hidden_size": 48, "embed_size": 24, "num_attention_heads": 4, "vocab_size": 96}
    config = {"model_type": "kphi3", "num_hidden_layers": 2, "pad_token_id": 0, **sizes, **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert str(tmp_path / "config.json") in planned(tmp_path)


def test_the_divisors_of_a_large_number_are_found_at_once() -> None:
    found = common_divisors(10**12, 10**12)
    assert len(found) == 169
    assert found == sorted(found)
    for size in range(1, 200):
        assert common_divisors(size, 0) == [d for d in range(1, size + 1) if size % d == 0]


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "kernels-community/flash-attn2@rev:name"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"experts_implementation": {"": "evil/kernel"}},
        {"vision_config": {"attn_implementation": "evil/kernel"}},
    ],
)
def test_a_config_cannot_name_code_on_the_hub(folder: Path, change: dict[str, Any]) -> None:
    edit_json(folder / "config.json", **change)
    assert "names code on the hub" in planned(folder)
    assert "names code on the hub" in refused(open_source, folder, trust_remote_code=True)


def test_a_config_cannot_name_other_weights(folder: Path) -> None:
    save_file({"a": torch.ones(1)}, folder / "other.safetensors")
    edit_json(folder / "config.json", transformers_weights="other.safetensors")
    assert "transformers_weights names another file" in refused(open_source, folder)


def test_a_changed_config_is_checked_before_verifying_builds_it(tmp_path: Path) -> None:
    with quiet():
        model = tiny_model("llama")
        api.slim(model, RECIPE, init="random")
        api.save(model, tmp_path / "slim")
    edit_json(tmp_path / "slim" / "config.json", num_hidden_layers=10**9)
    problems = verify_folder(tmp_path / "slim").problems
    assert any("num_hidden_layers 1,000,000,000" in problem for problem in problems)


def test_real_configs_pass(folder: Path) -> None:
    check_config({"id2label": {0: "LABEL_0"}}, "read by a config class")
    usual = {"num_hidden_layers": 126, "vocab_size_per_layer_input": 262_144, "n_embd": 12_288}
    large = {"max_position_embeddings": 10_485_760, "num_experts": 384, "layer_norm_eps": 1e-5}
    check_config({**usual, **large, "attn_implementation": "sdpa"}, "config.json")
    check_config(read_json(folder / "config.json"), "config.json")


# -------------------------------------------------------------------- other files in the folder


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"]
)
def test_a_link_out_of_the_folder_is_not_followed(folder: Path, name: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text((folder / "config.json").read_text())
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    said = planned(folder)
    assert f"{folder / name}: a link to a place outside" in said


def test_links_within_the_folder_and_the_hubs_own_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    blobs.mkdir()
    with quiet():
        tiny_model("llama").save_pretrained(snapshot)
    (snapshot / "model.safetensors").rename(blobs / "f00d")
    (snapshot / "config.json").rename(blobs / "beef")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/f00d"))
    (snapshot / "config.json").symlink_to(Path("../../blobs/beef"))
    (snapshot / "same.json").symlink_to("config.json")
    assert load_model(open_source(snapshot)).config.model_type == "llama"


def test_an_adapter_is_not_applied_unasked(folder: Path) -> None:
    content = {"peft_type": "LORA", "base_model_name_or_path": "owner/other"}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    assert "holds an adapter" in refused(open_source, folder)


def test_code_beside_the_weights_runs_only_when_it_is_trusted(folder: Path, tmp_path: Path) -> None:
    """In a process of its own: neither config nor tokenizer nor recipe can switch it on."""
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    )
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_json(folder / "config.json", auto_map=auto_map, trust_remote_code=True)
    tiny_tokenizer().save_pretrained(folder)
    own = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    edit_json(folder / "tokenizer_config.json", auto_map=own, trust_remote_code=True)
    (folder / "generation_config.json").write_text(json.dumps({"trust_remote_code": True}))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(ran)!r}, 'w')\n{EVIL}")
    code = (
        "import sys; from llmslim import api\n"
        f"api.convert({str(folder)!r}, {RECIPE!r}, {str(tmp_path / 'out')!r}, init='random')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, stdin=None
    )
    assert done.returncode == 0, done.stderr
    assert not ran.exists()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "evil" not in json.dumps(written["auto_map"])
    with pytest.raises(RecipeError, match=r"^recipe trust_remote_code: "):
        Recipe.of({**RECIPE, "trust_remote_code": True})


@pytest.mark.parametrize("given", ["a" * 5000, "\0", "~nobody-of-that-name/x", "a/" + "b" * 300])
def test_a_name_that_no_file_can_have(given: str) -> None:
    assert "not a local folder or file" in refused(open_source, given)
    with pytest.raises(RecipeError):
        Recipe.load(given)


# --------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("replace: [" + "{}," * 30_000 + "]", "more than 50,000 keys and values"),
        ("a: " + "1:" * 200_000 + "1", "a value of more than 10,000 characters"),
        ("a: " + "&a [" * 5 + "*a" + "]" * 5, "a YAML alias"),
        ("a: !!timestamp x", "not valid YAML"),
        ("budget: 1e999999999", "finite number"),
        ("budget: '1e400'", "finite number"),
        ("refine: {lr: .inf}", "finite number"),
        ("calibration: {seed: 1" + "0" * 50 + "}", "less than"),
        ("width: {intermediate_size: 1" + "0" * 50 + "}", "less than"),
        ("name: ../../elsewhere", "should match pattern"),
        ('name: "x\\e[2J"', "should match pattern"),
        ("name: " + "x" * 9000, "at most 100 characters"),
    ],
)
def test_a_recipe_made_to_harm_is_refused_at_once(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    start = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert time.monotonic() - start < 15


def test_a_recipe_of_ten_megabytes_or_without_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for size in (10 << 20, 1 << 40):
        with path.open("wb") as file:
            file.truncate(size)
        with pytest.raises(RecipeError, match=rf"^{path}: {size:,} .* 1,048,576"):
            Recipe.load(path)


# ------------------------------------------------------------------ slim checkpoints, and reports


@pytest.fixture
def slim(folder: Path, tmp_path: Path) -> Path:
    return api.convert(folder, RECIPE, tmp_path / "slim", init="random").path


def test_a_broken_slim_config_asks_nobody_to_trust_its_code(slim: Path) -> None:
    for change_to in ({"base_model_type": "llmslim"}, {"base_model_type": None}, {"llmslim": 3}):
        edit_json(slim / "config.json", **change_to)
        said = refused(api.load, slim)
        assert said.startswith(f"{slim}: its config.json cannot be used")
        assert "trust" not in said
        assert "recursion" not in said


def test_what_a_changed_report_says_is_held_to_its_types(slim: Path) -> None:
    path = slim / "llmslim_report.json"
    good = json.loads(path.read_text())
    for where, key, value in (
        (None, "model", 5),
        (None, "recipe", {"a": 1}),
        (None, "problems", [1]),
        (None, "fitted_to", 5),
        (3, "name", 5),
        (3, "reason", None),
        (3, "kind", "x"),
        (3, "action", ["replaced"]),
        (3, "structure", ["low_rank"]),
        (3, "options", [1]),
        (3, "in_features", "x"),
        (3, "params_before", 9216.0),
        (3, "init_error", "x"),
    ):
        report = json.loads(json.dumps(good))
        (report if where is None else report["rows"][where])[key] = value
        path.write_text(json.dumps(report))
        for name in ("text", "svg", "md"):
            ran = CliRunner().invoke(cli, ["report", str(slim), "-f", name])
            assert ran.exit_code == 1
            assert "not a llmslim report" in ran.output, (key, ran.output)


@pytest.mark.parametrize("content", ["[]", "5", '"x"'])
def test_a_generation_config_that_is_none(folder: Path, tmp_path: Path, content: str) -> None:
    (folder / "generation_config.json").write_text(content)
    said = refused(api.convert, folder, RECIPE, tmp_path / "out", init="random")
    assert said.startswith(f"{folder / 'generation_config.json'}: cannot be used")
    assert names(tmp_path) == ["llama"]


@pytest.mark.parametrize("template", ["{% bad", "{{ [].x.y }}", "{% for x in range(10**9) %}"])
def test_a_chat_template_that_fails_is_one_sentence(folder: Path, template: str) -> None:
    tiny_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template + ("{% endfor %}" * ("for" in template)))
    ran = CliRunner().invoke(cli, ["generate", str(folder), "hello"])
    assert ran.exit_code == 1
    assert "chat template: fails for this prompt" in ran.output


@pytest.mark.parametrize("command", ["report", "verify"])
def test_a_folder_name_that_is_too_long_is_none(command: str) -> None:
    ran = CliRunner().invoke(cli, [command, "x" * 300])
    assert ran.exit_code == 1
    assert "did not expect this error" not in ran.output


def test_a_message_cannot_steer_a_terminal(slim: Path) -> None:
    manifest = json.loads((slim / "llmslim_manifest.json").read_text())
    manifest["files"]["\x1b[2J\r"] = {}
    (slim / "llmslim_manifest.json").write_text(json.dumps(manifest))
    ran = CliRunner().invoke(cli, ["verify", str(slim)], color=True)
    assert "?[2J?: missing." in ran.output
