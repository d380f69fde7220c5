"""What a model's card or GGUF file says of its origin, and what a slim model keeps of that."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_checkpoint import tiny_tokenizer
from tiny import tiny_model

import llmslim
from llmslim.export import write_gguf
from llmslim.storage import Origin, load_model, open_source, origin_of

TERMS = {"license": "other", "license_name": "mine", "license_link": "LICENSE"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tiny_model("llama", num_hidden_layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def model_with(weights: Path, folder: Path, **front: Any) -> Path:
    shutil.copytree(weights, folder)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n# A model\n")
    return folder


def front_of(folder: Path) -> dict[str, Any]:
    front: dict[str, Any] = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    return front


def test_terms_and_languages_stay_with_a_model_through_slimming_and_healing(
    weights: Path, tmp_path: Path
) -> None:
    front = {**TERMS, "language": ["en"], "base_model": "who/older", "tags": ["x"]}
    folder = model_with(weights, tmp_path / "dense", **front)
    (folder / "LICENSE").write_text("Do as you like.")
    slim = llmslim.convert(folder, "mlp-half", tmp_path / "slim", init="project").path
    kept = {**TERMS, "language": ["en"], "base_model": "who/older", "tags": ["llmslim"]}
    assert kept.items() <= front_of(slim).items()
    rows = "".join(f'{{"text": "the fox {n}"}}\n' for n in range(20))
    (tmp_path / "a.jsonl").write_text(rows)
    data, options = str(tmp_path / "a.jsonl"), {"context_length": 16, "held_out": 2}
    healed = llmslim.heal(slim, tmp_path / "healed", data=data, epochs=1, settings=options)
    assert kept.items() <= front_of(healed.path).items()
    assert "datasets" not in front_of(healed.path)  # a file on this disk
    for made in (slim, healed.path):
        assert (made / "LICENSE").read_text() == "Do as you like."
        assert llmslim.verify(made).ok


def test_a_model_in_the_cache_of_the_hub_has_its_name(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--who--dense-1" / "snapshots" / "0123abcd"
    model_with(weights, folder, license="mit", base_model=["who/older"])
    assert origin_of(open_source(folder)) == Origin("who/dense-1", "who/older", {"license": "mit"})
    nobodys = model_with(weights, tmp_path / "models--dense" / "snapshots" / "0123abcd")
    assert origin_of(open_source(nobodys)).name == ""


def test_gguf_metadata(weights: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write_gguf(load_model(open_source(weights)), tmp_path / "a.gguf", name="a", tokenizer=None)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, inner)
    writer.add_license("other")
    writer.add_license_link("https://example.org")
    writer.add_languages(["en", "de"])
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "https://huggingface.co/who/older")
    writer.add_source_repo_url("https://huggingface.co/who/dense")
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    terms = {"license": "other", "license_link": "https://example.org"}
    found = origin_of(open_source(tmp_path / "b.gguf"))
    assert found == Origin("who/dense", "who/older", terms, ("en", "de"))
    assert origin_of(open_source(tmp_path / "a.gguf")) == Origin("", "", {}, ())


@pytest.mark.parametrize(
    "card",
    [
        "# no front matter\n---\nlicense: mit\n---\n",
        "---\nlicense: mit\n",
        "---\n- license\n---\n",
        "---\nlicense: [mit\n---\n",
        "---\nlicense: 3\nlanguage: {a: b}\nbase_model: ../../etc\n---\n",
        "---\nbase_model: [a/b, c/d]\nlicense: !!python/object/apply:os.getcwd []\n---\n",
        "\udcff",
    ],
)
def test_what_is_no_plain_text_counts_as_not_said(weights: Path, tmp_path: Path, card: str) -> None:
    folder = model_with(weights, tmp_path / "m")
    (folder / "README.md").write_bytes(card.encode(errors="surrogateescape"))
    found = origin_of(open_source(folder))
    assert (found.name, found.base_model, found.front_matter()) == ("", "", {})
