"""What the tests of text for healing share: short calls, small files, a hub of their own."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from helpers_checkpoint import tiny_tokenizer
from helpers_data import plain_tokenizer, put, table, with_start
from test_packing import samples_in

from llmslim.data import HealingText, Rows, healing_text
from llmslim.data.prompts import Encoder
from llmslim.errors import DataError
from llmslim.recipe.schema import Heal

EOS = 1
CHATML = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}~{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def heal(data: Any, *, tokenizer: Any = None, length: int = 64, **options: Any) -> HealingText:
    passing = {key: options.pop(key) for key in ("teacher", "cache", "progress") if key in options}
    return healing_text(
        Heal(data=data, **options),
        plain_tokenizer() if tokenizer is None else tokenizer,
        context_length=length,
        **passing,
    )


def problem(data: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        heal(data, **options)
    return str(caught.value)


def texts_in(rows: Rows, *, learned: bool = False) -> list[str]:
    """Return every sample's text without its end token; or only what is learned of it."""
    tokenizer = tiny_tokenizer()
    found = []
    for index in range(len(rows)):
        for ids, labels in samples_in(rows[index]):
            if any(label != -100 for label in labels):
                kept = [i for i, label in zip(ids, labels, strict=True) if label != -100]
                found.append(tokenizer.decode([i for i in (kept if learned else ids) if i > EOS]))
    return found


def everything(text: HealingText) -> list[str]:
    return sorted(texts_in(text.train) + texts_in(text.held_out))


PAIRS = [(f"Q{i:03}", f"A{i * i:05}") for i in range(60)]


def pairs(question: str = "prompt", answer: str = "completion") -> list[dict[str, Any]]:
    return [{question: q, answer: a} for q, a in PAIRS]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return put(path, text.getvalue().encode())


def hub(monkeypatch: pytest.MonkeyPatch, local: str, **info: Any) -> list[Any]:
    """Let a local parquet file stand for every data set of the hub; return the calls."""
    load, calls = datasets.load_dataset, []

    def stand_in(name: str, config: str | None, *, split: str, streaming: bool = False) -> Any:
        calls.append((name, config, split, streaming))
        return load("parquet", data_files={split: local}, split=split, streaming=streaming)

    known = SimpleNamespace(**{"license": "", "download_size": 1000, **info})
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda *_: SimpleNamespace(info=known, hash="1")
    )
    return calls


def tagged_tokenizer() -> Any:
    tokenizer = with_start(plain_tokenizer())
    tags = ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tags})
    return tokenizer


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Encoder, "__call__", refuse)


def heal_lamini_of(tmp_path: Path, rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        short = [{"instruction": "Q", "response": "A"}] * rows
        hub(patch, table("parquet", tmp_path / "short.parquet", short))
        heal("lamini")
