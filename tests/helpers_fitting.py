"""What the tests of fits to text share: random tokens, full precision, and a distance."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import logits, tokens

import llmslim
from llmslim.data import Windows
from llmslim.fitting import layerwise

MLP = ["*.mlp.*", "*.fc1", "*.fc2"]
WINDOWS = Windows(tokens(16, 64), "random tokens", tokens(1, 64, seed=5))


@pytest.fixture(autouse=True)
def in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run layers in float32 whatever the processor is fast at."""
    monkeypatch.setattr(layerwise, "fast_type", lambda *_: None)


def rows_of(report: llmslim.Report, ending: str) -> list[Any]:
    return [row for row in report.rows if row.name.endswith(ending)]


def distance(model: Any, dense: Any) -> float:
    ids = tokens(6, 16, seed=9)
    expected = logits(dense, ids)
    return float((logits(model, ids) - expected).norm() / expected.norm())
