"""Publishing on the hub: one commit with everything, against a stand-in for the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_cli import ok, run
from hub_stand_in import Hub, serving
from huggingface_hub import ModelCard, constants
from tiny import tiny_model

import llmslim
from llmslim.errors import CheckpointError
from llmslim.evaluation import Estimate, Evaluation, TaskScore, TextScores, keep_evaluation

# The hub's client uploads large files in a way that its HTTP library calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
        yield found


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny_model("llama", num_hidden_layers=1).save_pretrained(folder)
    return folder


def slim(dense: Path, out: Path) -> Path:
    return llmslim.convert(dense, "mlp-half", out, init="project", base_model="who/dense").path


def files_of(hub: Hub, repo: str, branch: str = "main") -> dict[str, bytes]:
    start = f"{repo}@{branch}:"
    return {name.removeprefix(start): hub.files[name] for name in hub.files if start in name}


def test_every_file_goes_up_in_one_commit(hub: Hub, dense: Path, tmp_path: Path) -> None:
    folder = slim(dense, tmp_path / "slim")
    address = llmslim.push(folder, "me/slim", private=True)
    assert address == f"{hub.address}/me/slim/commit/{'0' * 40}"
    assert hub.repos["me/slim"]["visibility"] == "private"
    assert len(hub.commits) == 1
    assert files_of(hub, "me/slim") == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_scores_stand_in_the_card_and_its_hash_in_the_manifest(
    hub: Hub, dense: Path, tmp_path: Path
) -> None:
    folder = slim(dense, tmp_path / "slim")
    texts = (TextScores("wiki.txt", 2, 8, Estimate(1.0)),)
    tasks = (TaskScore("piqa", "acc", 0.61),)
    keep_evaluation(folder, Evaluation("slim", texts=texts, tasks=tasks))
    llmslim.push(folder, "me/slim")
    sent = files_of(hub, "me/slim")
    card = ModelCard(sent["README.md"].decode())
    assert card.data.base_model == "who/dense"
    found = {
        (one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results
    }
    assert found == {("wiki.txt", "perplexity"): 2.7183, ("piqa", "acc"): 0.61}
    assert "## What changed" in card.text
    for name, content in sent.items():
        (tmp_path / "down" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "down" / name).write_bytes(content)
    assert llmslim.verify(tmp_path / "down").ok
    listed = json.loads(sent["llmslim_manifest.json"])["files"]["README.md"]
    assert listed["sha256"] == hashlib.sha256(sent["README.md"]).hexdigest()
    assert llmslim.verify(folder).ok  # what is here stays as it was


def test_commands(hub: Hub, dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slim"
    options = ("--recipe", "mlp-half", "--init", "project", "--push", "me/slim")
    text = ok("convert", dense, *options, "--out", folder)
    assert f"pushed to {hub.address}/me/slim/commit/" in text
    shown = ok("push", folder, "me/other", "--dry-run")
    assert "other" not in "".join(hub.repos)
    assert {*shown.splitlines()} >= {path.name for path in folder.iterdir()}
    ok("push", folder, "me/other", "--revision", "next")
    assert hub.branches == ["next"]
    assert files_of(hub, "me/other", "next").keys() == files_of(hub, "me/slim").keys()


@pytest.mark.parametrize("repo", ["slim", "a/b/c", "../x", "me/", ""])
def test_what_is_no_name_on_the_hub(hub: Hub, dense: Path, tmp_path: Path, repo: str) -> None:
    with pytest.raises(CheckpointError, match="owner/name"):
        llmslim.push(tmp_path, repo)
    options = ("--recipe", "mlp-half", "--init", "project", "--push", repo)
    assert run("convert", dense, *options, "--out", tmp_path / "slim").exit_code == 1
    assert not (tmp_path / "slim").exists()  # before any work
    assert not hub.repos


def test_a_changed_checkpoint_stays_at_home(hub: Hub, dense: Path, tmp_path: Path) -> None:
    folder = slim(dense, tmp_path / "slim")
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        llmslim.push(folder, "me/slim")
    assert not hub.repos


def test_a_refusal_is_one_sentence(hub: Hub, dense: Path, tmp_path: Path) -> None:
    folder = slim(dense, tmp_path / "slim")
    hub.refuses = 403
    with pytest.raises(CheckpointError, match=r"^me/slim: .*403"):
        llmslim.push(folder, "me/slim")
    assert not hub.files
