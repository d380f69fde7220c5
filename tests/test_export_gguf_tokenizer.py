"""Tokenizers in GGUF files: pieces, merges, scores, and the rule that splits text."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_checkpoint import TEMPLATE
from helpers_gguf import bpe_tokenizer, keys_of, write
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmslim.errors import CheckpointError


def test_the_tokenizer_and_its_template_are_in_the_file(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(additional_special_tokens=["<|im_end|>"])
    model = tiny_model("llama", vocab_size=100)
    keys = keys_of(write(model, tmp_path / "m.gguf", tokenizer))
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    assert keys["tokenizer.ggml.tokens"] == [by_id.get(i, f"[PAD{i}]") for i in range(100)]
    assert keys["tokenizer.ggml.token_type"] == [3, 3, *[1] * 94, 3, 5, 5, 5]
    assert keys["tokenizer.ggml.merges"] == ["! !"]
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.chat_template"] == TEMPLATE
    assert keys["tokenizer.ggml.eos_token_id"] == 1
    assert keys["tokenizer.ggml.padding_token_id"] == 0
    assert keys["tokenizer.ggml.add_bos_token"] is False


def test_the_rule_that_splits_text_is_named_by_what_it_is(tmp_path: Path) -> None:
    from tokenizers import Regex
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    qwen = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    rules = {
        "smollm": pre_tokenizers.Sequence([digits, byte_level]),
        "qwen2": pre_tokenizers.Sequence([qwen, pieces]),
    }
    model = tiny_model("llama", num_hidden_layers=1)
    tokenizer = bpe_tokenizer()
    for name, rule in rules.items():
        tokenizer.backend_tokenizer.pre_tokenizer = rule
        keys = keys_of(write(model, tmp_path / "m.gguf", tokenizer))
        assert keys["tokenizer.ggml.pre"] == name
    other = pre_tokenizers.Split(Regex(r"\w+"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([other, pieces])
    with pytest.raises(CheckpointError, match=r"tokenizer: .*Split, ByteLevel"):
        write(model, tmp_path / "n.gguf", tokenizer)
    assert not list(tmp_path.glob("*n.gguf*"))


def test_pieces_are_scored_by_the_order_of_their_merges(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "ab", "▁ab", "▁a"]
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab"), ("▁a", "b")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    model = tiny_model("llama", vocab_size=len(pieces), num_hidden_layers=1)
    keys = keys_of(write(model, tmp_path / "m.gguf", tokenizer))
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    assert keys["tokenizer.ggml.token_type"] == [2, 3, 3, *[6] * 256, *[1] * 6]
    score = dict(zip(pieces, keys["tokenizer.ggml.scores"], strict=True))
    assert score["▁a"] > score["ab"] > score["▁ab"] > score["b"]
