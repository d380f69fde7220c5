"""`llmslim convert`, on tiny models."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import torch
from helpers_cli import NON_EMBEDDING, SAVED, ok, run, stub
from helpers_cli import _restore_logging as _restore_logging
from helpers_cli import dense as dense
from helpers_cli import recipe as recipe
from helpers_cli import slim as slim
from reference_kphi3 import Reference
from tiny import logits, tokens
from transformers import AutoModelForCausalLM

from llmslim.recipe import shipped_recipes
from llmslim.report.read import read_report
from llmslim.report.report import Report


def test_convert_writes_a_model_that_loads(dense, recipe, tmp_path):
    text = ok("convert", dense, "--recipe", recipe, "--out", tmp_path / "out")
    assert f"{NON_EMBEDDING - SAVED:,}" in text
    assert f"llmslim generate {tmp_path / 'out'}" in text
    assert "healed" in text
    assert "healed" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"}
    left = {n: p.numel() for n, p in model.named_parameters() if n not in embeddings}
    assert sum(left.values()) == NON_EMBEDDING - SAVED
    kept = AutoModelForCausalLM.from_pretrained(dense).model.layers[1].self_attn.q_proj.weight
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, kept)


def test_convert_names_the_folder_itself(dense, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ok("convert", dense, "--recipe", recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-rank-four"]


def test_convert_keeps_what_is_there(dense, recipe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    result = run("convert", dense, "--recipe", recipe, "--out", out)
    assert result.exit_code == 1
    assert str(out) in result.stderr
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_convert_overwrites_a_checkpoint_when_asked(dense, recipe, slim, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(dense, out)
    ok("convert", dense, "--recipe", recipe, "--out", out, "--overwrite")
    assert read_report(out).report == read_report(slim).report
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_convert_dry_run_writes_nothing(dense, recipe, tmp_path):
    text = ok("convert", dense, "--recipe", recipe, "--out", tmp_path / "out", "--dry-run")
    assert f"{NON_EMBEDDING - SAVED:,}" in text
    assert text.endswith("dry run: nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_convert_dry_run_tells_the_cost_of_the_text_asked_for(dense, recipe, tmp_path):
    planned = ("convert", dense, "--recipe", recipe, "--out", tmp_path / "out", "--dry-run")
    assert "fitting to" not in ok(*planned)
    asked = ("--calibration", "text.txt", "--calibration-tokens", "4096")
    assert "fitting to 4,096 tokens" in ok(*planned, *asked)
    assert "fitting to 65,536 tokens" in ok(*planned, *asked[:2])
    assert "fitting to" not in ok(*planned, *asked, "--init", "project")


def test_convert_hands_every_option_on(monkeypatch, tmp_path):
    made = SimpleNamespace(path=tmp_path, report=Report("m", "r", ()), auto_class="A")
    calls = stub(monkeypatch, "convert", made)
    options = ["--init", "random", "--dtype", "bfloat16", "--seed", "7", "--trust-remote-code"]
    options += ["--calibration", "text.txt", "--calibration-tokens", "99", "--allow-nonfinite"]
    options += ["--calibration", "self", "--device", "cuda:1", "--no-own-text"]
    options += ["--max-shard-size", "2GB", "--resume", "--base-model", "who/dense"]
    ok("convert", "model", "--recipe", "mlp-half", "-o", tmp_path / "o", "--overwrite", *options)
    [(args, kwargs)] = calls
    assert (args, kwargs.pop("recipe").name) == (("model",), "mlp-half")
    assert callable(kwargs.pop("progress"))
    assert kwargs == {
        "out": str(tmp_path / "o"),
        "allow_nonfinite": True,
        "max_shard_size": "2GB",
        "resume": True,
        "init": "random",
        "dtype": "bfloat16",
        "seed": 7,
        "calibration": ("text.txt", "self"),
        "own_text": False,
        "calibration_tokens": 99,
        "device": "cuda:1",
        "base_model": "who/dense",
        "trust_remote_code": True,
        "overwrite": True,
    }


def test_convert_without_recipe_lists_the_shipped_ones(dense):
    result = run("convert", dense)
    assert result.exit_code == 2
    for name in shipped_recipes():
        assert name in result.stderr


def test_a_kphi3_folder_needs_no_recipe(tmp_path):
    reference = Reference()
    folder, out = reference.save(tmp_path / "published"), tmp_path / "out"
    planned = ok("convert", folder, "--out", out, "--dry-run")
    assert not out.exists()
    text = ok("convert", folder, "--out", out)
    assert planned.splitlines()[0] in text
    assert "healed" not in text + (out / "README.md").read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = tokens(vocab=64)
    torch.testing.assert_close(logits(model, ids), reference.logits(ids), rtol=1e-3, atol=1e-3)
