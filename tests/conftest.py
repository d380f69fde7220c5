"""Options and fixtures for all tests."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import accelerate.utils.memory
import pytest
import torch
from tiny import tiny_model
from transformers import dynamic_module_utils

from llmslim.healing import plan
from llmslim.storage import quiet

# Tiny products lose far more to a second thread than they gain.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--update-golden`."""
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden with what comes out now"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those that ask for one: what they compare was made without."""
    if "not gpu" in config.getoption("-m"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """Keep what is imported out of every garbage collection: training alone makes hundreds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """Do not wait for the disk: no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def uncollected() -> Iterator[None]:
    """Leave out the garbage collection after every training: it takes as long as many of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate.utils.memory, "clear_device_cache", lambda **_options: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def healing_in_full_precision() -> Iterator[None]:
    """Heal in float32 unless a test sets `precision`, whatever is fast on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "bf16_is_fast", lambda _device: False)
        yield


@pytest.fixture
def no_remote_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Start without remote code, as a fresh process does: none cached, none imported."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "remote_code"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # the cache is added to it
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


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
