"""`llmslim generate`, on tiny models."""

from __future__ import annotations

import pytest
import torch
from helpers_cli import _restore_logging as _restore_logging
from helpers_cli import dense as dense
from helpers_cli import ok, run, write_tokenizer
from helpers_cli import recipe as recipe
from helpers_cli import slim as slim
from tiny import logits, tiny_model
from transformers import AutoModelForCausalLM


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
    assert "PROMPT: has no tokens" in result.stderr


def test_generate_needs_a_tokenizer(tmp_path):
    tiny_model(num_hidden_layers=2).save_pretrained(tmp_path)
    result = run("generate", tmp_path, "w1")
    assert result.exit_code == 1
    assert "no tokenizer" in result.stderr
