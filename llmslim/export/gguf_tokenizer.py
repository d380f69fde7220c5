"""A tokenizer as llama.cpp keeps it in a GGUF file.

llmslim knows two kinds. Byte-level BPE (`gpt2`): the tokens, their merges, and the name of the
rule that splits text into words first; a name that does not fit would give other tokens without an
error, so the rule is looked up by what it is, and an unknown one is refused. SentencePiece's BPE
(`llama`): the tokens and a score for each, the place of the first merge that makes it.

Names of the rules: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from llmslim.errors import CheckpointError
from llmslim.storage import quiet

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""Kinds of tokens, as the format numbers them."""

_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+SUFFIX"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*SUFFIX"
    r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PLAIN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES = {
    _PLAIN.replace("DIGITS", r"\p{N}{1,3}"): "llama-bpe",
    _PLAIN.replace("DIGITS", r"\p{N}"): "qwen2",
    _CASED.replace("SUFFIX", "").replace("DIGITS", r"\p{N}"): "tekken",
    _CASED.replace("SUFFIX", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("DIGITS", r"\p{N}{1,3}"): (
        "gpt-4o"
    ),
}
"""llama.cpp's names of the expressions that split text into words."""


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase | None, rows: int) -> None:
    """Add a tokenizer and its chat template to a GGUF file's metadata.

    Args:
        writer: a `gguf.GGUFWriter`.
        tokenizer: the model's; without one the file can be used with token ids only.
        rows: tokens that the model has an embedding for.

    Raises:
        CheckpointError: if llama.cpp has no such tokenizer.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        _refuse(type(tokenizer).__name__)
    data = json.loads(backend.to_str())
    model = data["model"]
    if model["type"] != "BPE" or not model["merges"]:
        _refuse(f"{model['type']}, or without merges")
    tokens, kinds = _tokens(data, rows)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_puts_a_space_first(data))
        writer.add_token_scores(_scores(model, tokens))
        kinds = _kinds_of_pieces(model, tokens, kinds)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_rule(data))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _add_special(writer, tokenizer, rows, merges=not model.get("byte_fallback"))


def _tokens(data: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return the text and the kind of every token that the model has a row for.

    Raises:
        CheckpointError: if the tokenizer has more of its own.
    """
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [_UNUSED] * rows
    for text, i in data["model"]["vocab"].items():
        if i >= rows:
            _refuse(f"with token {i}, of a model for {rows}")
        tokens[i], kinds[i] = text, _NORMAL
    for added in data["added_tokens"]:
        if added["id"] < rows:  # padding that was added and never trained has no row
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    return tokens, kinds


def _kinds_of_pieces(model: dict[str, Any], tokens: list[str], kinds: list[int]) -> list[int]:
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
    return [
        _UNKNOWN
        if text == model.get("unk_token")
        else _BYTE
        if text in bytes_ and kind == _NORMAL
        else kind
        for text, kind in zip(tokens, kinds, strict=True)
    ]


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """Return a score for each token: the sooner a merge makes it, the higher."""
    places: dict[str, int] = {}
    for place, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        places.setdefault(left + right, place)
    return [-float(places.get(text, len(model["merges"]))) for text in tokens]


def _puts_a_space_first(data: dict[str, Any]) -> bool:
    steps = [*_steps(data["normalizer"]), *_steps(data["pre_tokenizer"])]
    return any(
        (step["type"] == "Prepend" and step["prepend"] == "▁")
        or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
        for step in steps
    )


def _rule(data: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rule that splits text into words.

    Raises:
        CheckpointError: if it has none that is known here.
    """
    steps = _steps(data["pre_tokenizer"])
    kinds = [step["type"] for step in steps]
    last = steps[-1] if steps else {}
    normalised = {step["type"] for step in _steps(data["normalizer"])} - {"NFC"}
    known = not normalised and kinds[-1:] == ["ByteLevel"] and not last["add_prefix_space"]
    if known and kinds == ["ByteLevel"] and last["use_regex"]:
        return "gpt-2"
    if known and kinds == ["Digits", "ByteLevel"] and last["use_regex"]:
        known = steps[0]["individual_digits"]
        rule = "smollm"
    elif known and kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
        known = steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]
        rule = _RULES.get(steps[0]["pattern"].get("Regex"), "")
    else:
        rule = ""
    if not (known and rule):
        _refuse(f"that splits text by {', '.join(kinds) or 'nothing'}, a rule of no known name")
    return rule


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normaliser or pre-tokenizer, sequences opened up."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers")
    return [part] if inner is None else [step for each in inner for step in _steps(each)]


def _add_special(
    writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int, *, merges: bool
) -> None:
    """Add merges, the special tokens and the chat template, which are read from a folder."""
    from gguf import SpecialVocab

    with TemporaryDirectory(prefix="llmslim-") as folder:
        with quiet():
            tokenizer.save_pretrained(folder)
        special = SpecialVocab(Path(folder), load_merges=merges, n_vocab=rows)
    ids = tokenizer("a")["input_ids"]
    special.add_special_token = {
        "bos": bool(ids) and ids[0] == tokenizer.bos_token_id,
        "eos": bool(ids) and ids[-1] == tokenizer.eos_token_id,
    }
    special.add_to_gguf(writer, quiet=True)


def _refuse(what: str) -> NoReturn:
    raise CheckpointError(
        f"tokenizer: {what}; GGUF files are written with byte-level BPE and SentencePiece's BPE. "
        "Export with --dense, and convert the result with llama.cpp's own script."
    )
