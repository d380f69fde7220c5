"""What all commands have in common: quiet runs, JSON, environment variables, short names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from helpers_cli import NON_EMBEDDING, SAVED, ok, run
from helpers_cli import _restore_logging as _restore_logging
from helpers_cli import dense as dense
from helpers_cli import recipe as recipe
from helpers_cli import slim as slim
from safetensors.torch import load_file

import llmslim
from llmslim.cli.main import cli
from llmslim.options import BenchOptions, ConvertOptions, EvalOptions


def saved(report: dict[str, Any]) -> int:
    totals = report["totals"]
    return int(totals["non_embedding_before"] - totals["non_embedding_after"])


@pytest.mark.parametrize(("word", "meant"), [("repot", "report"), ("Compare", "compare")])
def test_a_misspelt_command_suggests_the_right_one(word: str, meant: str) -> None:
    result = run(word)
    assert result.exit_code == 2
    assert f"'{meant}'" in result.stderr


def test_nothing_like_a_command_suggests_none() -> None:
    assert run("xyzzy").stderr.splitlines()[-1].count("'") == 2  # around the word itself


def test_every_result_is_json_if_asked(dense: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "slim"
    planned = json.loads(ok("plan", dense, "--recipe", recipe, "--json", "-"))
    converted = json.loads(ok("convert", dense, out, "-q", "--recipe", recipe, "--json", "-"))
    assert converted["path"] == str(out)
    shown = json.loads(ok("report", out, "--json", "-"))
    assert saved(planned) == saved(converted["report"]) == saved(shown) == SAVED
    assert shown["totals"]["non_embedding_before"] == NON_EMBEDDING
    verified = json.loads(ok("verify", out, "--json", "-"))
    assert (verified["ok"], verified["problems"]) == (True, [])
    dry = ("convert", dense, "--recipe", recipe, "--dry-run", "--json", "-")
    assert saved(json.loads(ok(*dry))["report"]) == SAVED
    exported = json.loads(ok("export", out, tmp_path / "plain", "--dense", "--json", "-"))
    assert exported == {"path": str(tmp_path / "plain")}
    (out / "config.json").write_text("{}")
    broken = run("verify", out, "--json", tmp_path / "verified.json")
    assert broken.exit_code == 1
    assert json.loads((tmp_path / "verified.json").read_text())["ok"] is False


def test_recipes_as_json() -> None:
    known = json.loads(ok("recipes", "--json", "-"))
    assert set(known) == set(ok("recipes").split()) & set(known)
    assert json.loads(ok("recipes", "mlp-half", "--json", "-"))["name"] == "mlp-half"


def test_an_answer_as_json(dense: Path) -> None:
    found = json.loads(ok("generate", dense, "w1 w2", "--max-new-tokens", 3, "--json", "-"))
    assert found["prompt"] == "w1 w2"
    assert found["tokens"] <= 3
    assert found["answer"] + "\n" == ok("generate", dense, "w1 w2", "--max-new-tokens", 3)


def test_a_healing_as_json(slim: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"w{n % 90} w{n % 7} w{n % 31}" for n in range(400)))
    options = ("--data", text, "--tokens", 200, "--context-length", 16, "--batch-size", 2)
    planned = json.loads(ok("heal", slim, tmp_path / "x", *options, "--dry-run", "--json", "-"))
    done = json.loads(ok("heal", slim, tmp_path / "x", *options, "-q", "--json", "-"))
    assert done["path"] == str(tmp_path / "x")
    assert done["steps"] == planned["steps"]
    kept = json.loads((tmp_path / "x" / "llmslim_report.json").read_text())["healing"]
    assert kept["loss_after"] == done["loss_after"]


def test_quiet_says_nothing_but_what_is_asked_for(
    dense: Path, recipe: Path, tmp_path: Path
) -> None:
    assert ok("-q", "convert", dense, "--recipe", recipe, "--out", tmp_path / "a") == ""
    assert ok("verify", tmp_path / "a", "--quiet") == ""
    assert ok("-q", "report", tmp_path / "a")
    assert run("-q", "verify", dense).stderr


def test_out_is_given_once(dense: Path, recipe: Path, tmp_path: Path) -> None:
    both = run("convert", dense, tmp_path / "a", "--out", tmp_path / "b", "--recipe", recipe)
    assert both.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_options_come_from_the_environment(dense: Path, recipe: Path) -> None:
    env = {"LLMSLIM_PLAN_RECIPE": str(recipe)}
    assert saved(json.loads(ok("plan", dense, "--json", "-", env=env))) == SAVED
    assert run("plan", dense).exit_code == 2


def test_every_option_has_the_variable_of_its_name() -> None:
    group = click.Context(cli)
    names = cli.list_commands(group)
    assert len(names) > 10
    for name in names:
        command = cli.get_command(group, name)
        assert command is not None
        for option in command.params:
            if isinstance(option, click.Option):
                long = [flag[2:] for flag in option.opts if flag.startswith("--")]
                assert len(long) == 1
                assert option.envvar == f"LLMSLIM_{name}_{long[0]}".replace("-", "_").upper()


def test_variables_of_options_that_have_other_names_in_python(
    dense: Path, slim: Path, tmp_path: Path
) -> None:
    env = {"LLMSLIM_VERIFY_JSON": "-", "LLMSLIM_REPORT_FORMAT": "csv"}
    env |= {"LLMSLIM_QUIET": "1", "LLMSLIM_VERSION": "0.1"}  # the latter is no option's
    assert json.loads(ok("verify", slim, env=env))["ok"] is True
    assert ok("report", slim, env=env) == ok("report", slim, "--format", "csv")
    assert ok("verify", slim, env={"LLMSLIM_QUIET": "1"}) == ""
    env = {"LLMSLIM_HEAL_SET": "warmup=0.1 top_k=-1"}
    refused = run("heal", slim, tmp_path / "out", "--dry-run", env=env)
    assert refused.exit_code == 1
    assert "top_k" in refused.stderr


@pytest.mark.parametrize("options", [ConvertOptions, EvalOptions, BenchOptions])
def test_short_names_of_types_are_the_long_ones(options: Any) -> None:
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    assert {short: options(dtype=short).dtype for short in names} == names
    assert options(dtype="bfloat16") == options(dtype="bf16")


def test_a_short_type_reaches_the_weights(dense: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "slim"
    ok("convert", dense, out, "-q", "--recipe", recipe, "--dtype", "bf16")
    files = list(out.glob("*.safetensors"))
    weights = {name: one for file in files for name, one in load_file(file).items()}
    assert {one.dtype for one in weights.values()} == {torch.bfloat16}
    assert str(llmslim.load(out, dtype="fp32").dtype) == "torch.float32"
    cpu = ("--device", "cpu", "--dtype", "fp32", "--max-new-tokens", 2)
    assert ok("generate", out, "w1", *cpu)
    assert run("generate", out, "w1", "--device", "nowhere").exit_code == 1


def test_a_row_is_a_line_in_a_pipe(slim: Path) -> None:
    lines = ok("report", slim).splitlines()
    (row,) = [line for line in lines if line.startswith("model.layers.{0-1}.mlp.up_proj")]
    assert "low_rank r=4" in row
    assert "96x48" in row
    # Commands are to be copied, and stay on one line at any width.
    narrow = ok("report", slim, env={"COLUMNS": "80"}).partition("make it again")[0].splitlines()
    assert max(map(len, narrow)) <= 80


def test_an_mlp_of_another_width_is_resized(dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "narrow.yaml"
    file.write_text("replace:\n  - {match: '*.mlp.*', structure: width, keep_ratio: 1/2}\n")
    (row,) = [line for line in ok("plan", dense, "-r", file).splitlines() if ".up_proj" in line]
    assert "resized" in row.split()
    assert "replaced" not in row.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell: str) -> None:
    code = "from llmslim.cli.main import main; main()"
    env = os.environ | {"_LLMSLIM_COMPLETE": f"{shell}_source"}
    script = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "_LLMSLIM_COMPLETE" in script.stdout
    env |= {"_LLMSLIM_COMPLETE": f"{shell}_complete"}
    env |= {"COMP_WORDS": "llmslim com", "COMP_CWORD": "com" if shell == "fish" else "1"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "compare" in found.stdout
