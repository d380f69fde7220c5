"""What the tests of text share: small files, tokenizers, a network and a cache of their own."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pytest
import torch
from helpers_checkpoint import tiny_tokenizer
from pyarrow import parquet

from llmslim.recipe.schema import Calibration


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and a cache folder of the test's own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def put(path: Path, data: bytes) -> str:
    """Write bytes, packed if the name says so."""
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def jsonl(path: Path, rows: list[Any]) -> str:
    return put(path, "\n".join(json.dumps(row) for row in rows).encode())


def parquet_bytes(rows: list[dict[str, Any]], **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue().to_pybytes()


def table(kind: str, path: Path, rows: list[dict[str, Any]]) -> str:
    return jsonl(path, rows) if kind == "jsonl" else put(path, parquet_bytes(rows))


def plain_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def spec(data: str | list[str], **changes: Any) -> Calibration:
    return Calibration(**{"data": data, "tokens": 64, "sequence_length": 8, **changes})


def ids_of(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def rows_of(*tensors: torch.Tensor) -> list[tuple[int, ...]]:
    return sorted(tuple(row) for ids in tensors for row in ids.tolist())


def with_start(tokenizer: Any) -> Any:
    """Make a tokenizer put its padding token, as a start, before every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<pad>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 0)]
    )
    return tokenizer
