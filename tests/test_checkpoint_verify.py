"""Verifying: every kind of difference is found and named, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers_checkpoint import edit_json, slim_llama, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from llmslim.errors import CheckpointError
from llmslim.storage import verify_folder, write_checkpoint, write_manifest


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "slim"
    return write_checkpoint(
        slim_llama(tie_word_embeddings=True), out, tokenizer=tiny_tokenizer(), report={}
    )


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "slim"))


def problems(folder: Path) -> tuple[str, ...]:
    found = verify_folder(folder)
    assert found.ok == (not found.problems)
    return found.problems


def test_what_was_written_verifies(folder: Path) -> None:
    found = verify_folder(folder)
    assert found.ok
    assert found.problems == ()
    assert found.path == folder
    assert found.files == len(list(folder.iterdir())) - 1


def test_a_flipped_bit_in_any_file(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.name == "llmslim_manifest.json":
            continue
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert f"{path.name}: changed; its SHA-256 is not the one written." in problems(folder)
        path.write_bytes(data)
    assert problems(folder) == ()


def test_a_missing_a_shorter_and_an_added_file(folder: Path) -> None:
    (folder / "llmslim_report.json").unlink()
    (folder / "chat_template.jinja").write_text("x")
    (folder / "sub").mkdir()
    (folder / "sub" / "new.bin").write_text("x")
    size = json.loads((folder / "llmslim_manifest.json").read_text())["files"][
        "chat_template.jinja"
    ]["bytes"]
    assert problems(folder) == (
        f"chat_template.jinja: 1 bytes; {size} were written.",
        "llmslim_report.json: missing.",
        "sub/new.bin: not in the manifest; it was added.",
    )


def test_what_git_and_the_hub_put_beside_it_does_not_count(folder: Path) -> None:
    (folder / ".gitattributes").write_text("x")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x").write_text("x")
    assert problems(folder) == ()


def test_weights_that_are_not_the_models_own_even_if_the_manifest_says_so(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(3)
    tensors["more"] = torch.ones(1)
    save_file(tensors, path)
    write_manifest(folder)
    assert problems(folder) == (
        "model.layers.0.mlp.up_proj.weight: a weight that the model needs is missing.",
        "more: a weight that the model does not have.",
        "model.layers.1.mlp.up_proj.weight: a weight of shape [3]; the model needs [4, 24, 24].",
    )


def test_weights_or_config_that_cannot_be_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert any(said.startswith(f"{path}: ") for said in problems(folder))
    path.write_bytes(whole)
    edit_json(folder / "config.json", llmslim={"format": 1, "sites": {"lm_head": {"structure": 1}}})
    assert any("config.json: cannot be loaded" in said for said in problems(folder))
    (folder / "config.json").write_text("{")
    assert any("config.json: not JSON" in said for said in problems(folder))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"llmslim_manifest\.json"),
        ("{", r"llmslim_manifest\.json: .*JSON"),
        ("[]", r"llmslim_manifest\.json: .*list"),
        ('{"format": 7, "files": {}}', r"llmslim_manifest\.json: .* 7; .* 1,"),
        ('{"format": 1}', r"llmslim_manifest\.json: .* 1; .* 1, .* files"),
    ],
)
def test_nothing_to_compare_with(folder: Path, content: str | None, said: str) -> None:
    manifest = folder / "llmslim_manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    with pytest.raises(CheckpointError, match=said):
        verify_folder(folder)
    with pytest.raises(CheckpointError, match=r"nowhere: .*llmslim_manifest\.json"):
        verify_folder(folder / "nowhere")


def test_a_manifest_that_names_files_elsewhere_reads_none_of_them(folder: Path) -> None:
    outside = folder.parent / "secret"
    outside.write_text("x")
    files = {"../secret": {"bytes": 1, "sha256": "0"}, str(outside): 5, "config.json": None}
    (folder / "llmslim_manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    found = problems(folder)
    assert "../secret: missing." in found
    assert f"{outside}: missing." in found
    assert any(said.startswith("config.json: ") and "None were written" in said for said in found)


def test_an_ordinary_checkpoint_verifies_too(tmp_path: Path) -> None:
    out = write_checkpoint(tiny_model("gpt2"), tmp_path / "dense")
    assert problems(out) == ()
