"""Options and fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from llmslim.checkpoint import quiet

# Tiny products lose far more to a second thread than they gain.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--update-golden`."""
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden with what comes out now"
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are rewritten before they are compared."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny dense Llama in one file."""
    path = tmp_path / "llama"
    with quiet():
        tiny_model("llama").save_pretrained(path)
    return path
