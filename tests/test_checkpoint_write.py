"""Writing checkpoints: whole or not at all, loadable anywhere, the same bytes every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import (
    TEMPLATE,
    disk_order,
    hashes,
    make_slim,
    names,
    same_bytes,
    slim_llama,
    stored,
    tiny_tokenizer,
)
from safetensors.torch import save_file
from tiny import ARCHITECTURES, few, logits, tiny_model, tokens
from tokenizers.normalizers import Lowercase
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llmslim import api
from llmslim.conversion.conversion_dir import ConversionDir
from llmslim.errors import CheckpointError
from llmslim.storage import (
    load_model,
    load_tokenizer,
    open_source,
    quiet,
    write_checkpoint,
)
from llmslim.storage.write import check_tokenizer

ROOT = Path(__file__).parents[1]

# Makes sure that the interpreter cannot find llmslim, installed or not.
WITHOUT_LLMSLIM = """
import importlib.abc, sys
class Guard(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "llmslim":
            raise ModuleNotFoundError(f"no {name} here", name=name)
sys.meta_path.insert(0, Guard())
sys.modules["llmslim"] = None
"""


def run(script: str, cwd: Path, *, isolated: bool = True, **env: str) -> Any:
    """Run a script in a fresh interpreter, elsewhere, with nothing to read from a terminal."""
    return subprocess.run(
        [sys.executable, *(["-I"] if isolated else []), "-c", script],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(cwd / "modules"), **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_save_and_load_give_the_same_bytes_and_logits(tmp_path: Path, dtype: torch.dtype) -> None:
    model = slim_llama(dtype)
    out = write_checkpoint(model, tmp_path / "slim")
    assert out == tmp_path / "slim"
    state, files = model.state_dict(), stored(out)
    assert state.keys() == files.keys()
    assert all(same_bytes(state[name], files[name]) for name in files)
    again = load_model(open_source(out))
    assert type(again) is type(model)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_untouched_weights_are_the_sources_bytes(tmp_path: Path) -> None:
    with quiet():
        tiny_model("llama").bfloat16().save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    model = load_model(open_source(tmp_path / "dense"))
    make_slim(model, {"mlp.up_proj": {"structure": "low_rank", "rank": 3}})
    write_checkpoint(model, tmp_path / "slim")
    before, after = stored(tmp_path / "dense"), stored(tmp_path / "slim")
    kept = {name for name in before if "up_proj" not in name}
    assert len(kept) == len(before) - 4
    assert all(same_bytes(before[name], after[name]) for name in kept)


@pytest.mark.parametrize("architecture", few(ARCHITECTURES))
def test_every_architecture_can_be_written_slim(tmp_path: Path, architecture: str) -> None:
    names = ("up_proj", "gate_up_proj", "c_fc", "fc1", "dense_h_to_4h", "attn.c_proj")
    blocks = {name: {"structure": "grouped_pointwise", "groups": 4} for name in names}
    model = make_slim(tiny_model(architecture), blocks)
    write_checkpoint(model, tmp_path / "slim")
    again = load_model(open_source(tmp_path / "slim"))
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_a_second_write_gives_the_same_bytes(tmp_path: Path) -> None:
    extras = {
        "tokenizer": tiny_tokenizer(),
        "report": {"b": 1, "a": [2]},
        "recipe_text": "name: x\n",
        "model_card": "# Slim\n",
    }
    write_checkpoint(slim_llama(), tmp_path / "one", **extras)
    again = load_model(open_source(tmp_path / "one"))
    tokenizer = load_tokenizer(tmp_path / "one")
    write_checkpoint(again, tmp_path / "two", **{**extras, "tokenizer": tokenizer})
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert names(tmp_path) == ["one", "two"]


def test_all_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose name is there and whose content is not is what a power cut would leave."""
    done = disk_order(monkeypatch, "rename")
    out = write_checkpoint(
        tiny_model("llama", num_hidden_layers=1), tmp_path / "out", tokenizer=tiny_tokenizer()
    )
    at = done.index(out)
    files = [out, *(path for path in out.rglob("*") if path.is_file())]
    assert len(files) > 4
    assert {path.stat().st_ino for path in files} <= set(done[:at])
    assert tmp_path.stat().st_ino in done[at:]  # the name itself


def test_what_is_in_the_folder(tmp_path: Path) -> None:
    with quiet():
        tiny_model("llama").save_pretrained(tmp_path / "dense")
    GenerationConfig(max_new_tokens=11).save_pretrained(tmp_path / "dense")
    source = open_source(tmp_path / "dense")
    model = load_model(source)
    make_slim(model, {"up_proj": {"structure": "low_rank", "rank": 3}})
    out = write_checkpoint(
        model,
        tmp_path / "deep" / "er" / "slim",  # parents are made
        source=source,
        tokenizer=tiny_tokenizer(),
        report={"rows": []},
        recipe_text="name: ünï\n",
        model_card="# Card\n",
    )
    assert json.loads((out / "llmslim_report.json").read_text()) == {"rows": []}
    assert (out / "recipe.yaml").read_bytes() == "name: ünï\n".encode()
    assert (out / "README.md").read_text() == "# Card\n"
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    assert GenerationConfig.from_pretrained(out).max_new_tokens == 11
    manifest = json.loads((out / "llmslim_manifest.json").read_text())
    assert manifest["files"].keys() | {"llmslim_manifest.json"} == hashes(out).keys()
    for listed, folder in ((manifest["files"], out), (manifest["source"]["files"], source.path)):
        for name, entry in listed.items():
            assert entry == {
                "bytes": (folder / name).stat().st_size,
                "sha256": hashes(folder)[name],
            }
    assert manifest["source"]["model"] == "dense"
    assert {"config.json", "model.safetensors"} <= manifest["source"]["files"].keys()
    assert str(tmp_path) not in (out / "llmslim_manifest.json").read_text()
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}  # the umask's, for weights too


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model = slim_llama(tie_word_embeddings=True)
    out = write_checkpoint(model, tmp_path / "slim")
    assert "lm_head.weight" not in stored(out)
    again = load_model(open_source(out))
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    write_checkpoint(slim_llama(), tmp_path / "slim", tokenizer=tokenizer)
    assert capfd.readouterr() == ("", "")


def test_where_llmslim_is_not_installed(tmp_path: Path) -> None:
    model = slim_llama(torch.bfloat16)
    out = write_checkpoint(model, tmp_path / "slim", tokenizer=tiny_tokenizer())
    ids = tokens()
    save_file({"ids": ids, "logits": logits(model, ids)}, tmp_path / "truth.safetensors")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = WITHOUT_LLMSLIM + textwrap.dedent(f"""
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
        out = {str(out)!r}
        try:
            import llmslim
        except ImportError:
            print("no llmslim")

        for trust in ({{}}, {{"trust_remote_code": False}}):
            try:
                AutoModelForCausalLM.from_pretrained(out, **trust)
            except ValueError as error:
                assert "trust_remote_code=True" in str(error), error
                print("\\nrefused")
            tokenizer = AutoTokenizer.from_pretrained(out, **trust)
            assert tokenizer.chat_template == {TEMPLATE!r}
            assert tokenizer("a b").input_ids == {tiny_tokenizer()("a b").input_ids}
            print("\\ntokenizer")

        model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
        assert isinstance(model, LlamaForCausalLM)
        truth = load_file({str(tmp_path / "truth.safetensors")!r})
        with torch.no_grad():
            logits = model(truth["ids"], use_cache=False).logits
        assert logits.dtype == truth["logits"].dtype
        assert torch.equal(logits, truth["logits"]), (logits - truth["logits"]).abs().max()
        print("same logits")
    """)
    done = run(script, elsewhere)
    expected = ["no llmslim", "refused", "tokenizer", "refused", "tokenizer", "same logits"]
    assert [line for line in done.stdout.splitlines() if line in expected] == expected, done.stderr


@pytest.mark.slow
def test_with_llmslim_imported_no_trust_is_needed(tmp_path: Path) -> None:
    out = write_checkpoint(slim_llama(), tmp_path / "slim", tokenizer=tiny_tokenizer())
    done = run(
        "import llmslim\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(out)!r})).__name__)\n"
        f"print(type(AutoTokenizer.from_pretrained({str(out)!r})).__name__)",
        tmp_path,
        isolated=False,
        PYTHONPATH=str(ROOT),
    )
    assert done.stdout.split() == ["SlimLlamaForCausalLM", "TokenizersBackend"], done.stderr


def test_weights_of_several_types_are_refused(tmp_path: Path) -> None:
    model = slim_llama()
    model.model.layers[1].mlp.up_proj.bfloat16()
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        write_checkpoint(model, tmp_path / "slim")
    assert names(tmp_path) == []


def test_weights_that_are_not_numbers_are_compared_as_bytes(tmp_path: Path) -> None:
    model = slim_llama()
    model.lm_head.weight.data[0, 0] = float("nan")
    out = write_checkpoint(model, tmp_path / "slim")
    assert stored(out)["lm_head.weight"].isnan().sum() == 1


def test_a_tokenizer_that_does_not_come_back_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained = lambda folder: tiny_tokenizer().save_pretrained(folder)
    tokenizer.chat_template = "another"
    with pytest.raises(CheckpointError, match=type(tokenizer).__name__):
        write_checkpoint(slim_llama(), tmp_path / "slim", tokenizer=tokenizer)
    assert names(tmp_path) == []


def test_a_tokenizer_that_splits_text_otherwise_is_refused(tmp_path: Path) -> None:
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer()
    other.save_pretrained(tmp_path)
    check_tokenizer(tokenizer, tmp_path)
    other.backend_tokenizer.normalizer = Lowercase()  # the same tokens, and the same template
    other.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        check_tokenizer(tokenizer, tmp_path)


def test_a_dense_model_is_written_as_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("llama")
    out = write_checkpoint(model, tmp_path / "dense", tokenizer=tiny_tokenizer())
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert not {"llmslim", "auto_map", "base_model_type"} & config.keys()
    assert not list(out.glob("*.py"))
    with quiet():
        again: Any = AutoModelForCausalLM.from_pretrained(out)
        tokenizer = AutoTokenizer.from_pretrained(out)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    assert tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("/", "the root of all folders"),
        ("a\0b", "not a place for a folder (embedded null byte)"),
        ("loop", "not a place for a folder (Symlink loop)"),
        ("loop/x", "not a place for a folder (Symlink loop)"),
        ("x" * 300, "not a place for a folder (File name too long)"),
        ("x" * 300 + "/y", "not a place for a folder (File name too long)"),
    ],
)
def test_a_target_that_no_folder_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError) as caught:
            write_checkpoint(slim_llama(), Path(out), overwrite=overwrite)
        assert said in str(caught.value)
        with pytest.raises(CheckpointError) as caught:
            ConversionDir(Path(out))
        assert said in str(caught.value)
    assert names(tmp_path) == ["loop"]


def test_a_model_is_not_overwritten_by_what_is_made_of_it(tmp_path: Path) -> None:
    rule = {"match": "*mlp*", "structure": "low_rank", "rank": 4}
    recipe = {"name": "r", "init": "random", "replace": [rule]}
    model = tmp_path / "models" / "m"
    with quiet():
        tiny_model().save_pretrained(model)
    (tmp_path / "models" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(model)
    before = hashes(tmp_path)
    for out in (model, tmp_path / "models", tmp_path / "link", model / ".." / "m"):
        with pytest.raises(CheckpointError, match=f": {model} "):
            api.convert(model, recipe, out, overwrite=True)
    assert hashes(tmp_path) == before
    slim = api.convert(model, recipe, model / "inside").path  # harms nothing
    with pytest.raises(CheckpointError, match=f": {slim} "):
        api.export_dense(slim, slim, overwrite=True)
    with pytest.raises(CheckpointError, match=rf"^{model}: {slim} "):
        api.heal(slim, model, overwrite=True)
    assert api.verify(slim).ok
