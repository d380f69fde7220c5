"""What the tests of the command line share: short calls, and tiny models on the disk."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from llmslim import api
from llmslim.cli.main import cli

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


def run(*args, env=None, **options):
    """Run the command line in this process.

    Workers of pytest-xdist have COLUMNS in their environment: readline puts it there.
    """
    words = [str(arg) for arg in args]
    env = {"COLUMNS": None, **(env or {})}
    return CliRunner().invoke(cli, words, prog_name="llmslim", env=env, **options)


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
