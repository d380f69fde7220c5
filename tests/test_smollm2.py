"""The whole way on a real model: convert, load where llmslim is not, generate, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from smollm2 import as_phi3, gguf_file
from test_loaded_model import GUARD, run
from tiny import logits
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmslim
from llmslim import Recipe
from llmslim.cli.commands import demo
from llmslim.healing.measure import answers

pytestmark = pytest.mark.slow

FRESH = (
    GUARD
    + """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
saved = torch.load("expected.pt")
with torch.no_grad():
    assert torch.equal(model(saved["ids"], use_cache=False).logits, saved["logits"])
kwargs = dict(max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(saved["ids"]))
cached = model.generate(saved["ids"], **kwargs)
assert torch.equal(cached, model.generate(saved["ids"], use_cache=False, **kwargs))
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
print("same")
"""
)


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as an ordinary folder."""
    folder = tmp_path_factory.mktemp("smollm2")
    llmslim.save(
        llmslim.load(gguf_file()),
        folder / "llama",
        tokenizer=AutoTokenizer.from_pretrained(gguf_file().parent, gguf_file=gguf_file().name),
    )
    return folder / "llama"


def check_in_a_fresh_process(out: Path, tmp_path: Path) -> None:
    ids = AutoTokenizer.from_pretrained(out)("The capital of France is", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(out)
    saved = {"ids": ids.input_ids, "logits": logits(model, ids.input_ids)}
    assert saved["logits"].isfinite().all()
    torch.save(saved, tmp_path / "expected.pt")
    done = run(FRESH, out, cwd=tmp_path)
    assert done.stdout.strip() == "same", done.stderr[-2000:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gguf_to_slim_and_back(dtype: str, dense_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "slim"
    done = llmslim.convert(gguf_file(), "grouped-half", out, dtype=dtype)
    dense = llmslim.load(dense_folder, dtype=dtype)
    slim: Any = AutoModelForCausalLM.from_pretrained(out)
    assert done.report.totals.params_after == sum(p.numel() for p in slim.parameters())
    replaced = {row.name for row in done.report.rows if row.action == "replaced"}
    assert len(replaced) == 90
    old, new = dense.state_dict(), slim.state_dict()
    for key in old:
        if key.rpartition(".")[0] not in replaced:
            assert torch.equal(old[key], new[key]), key
    check_in_a_fresh_process(out, tmp_path)
    assert llmslim.verify(out).ok

    llmslim.export_dense(out, tmp_path / "dense")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(exported).__name__ == "LlamaForCausalLM"
    ids = torch.arange(100, 140)[None]
    a, b = logits(slim, ids).float(), logits(exported, ids).float()
    assert (a - b).norm() / a.norm() < (1e-4 if dtype == "float32" else 0.05)


def test_as_phi3_with_the_published_rules(dense_folder: Path, tmp_path: Path) -> None:
    llama = llmslim.load(dense_folder)
    phi3 = as_phi3(llama)
    ids = torch.arange(100, 140)[None]
    assert torch.equal(logits(phi3, ids), logits(llama, ids))
    tokenizer = AutoTokenizer.from_pretrained(dense_folder)
    llmslim.save(phi3, tmp_path / "phi3", tokenizer=tokenizer)

    # 256 channels per group at Phi-3-mini's width of 3072 are 48 at SmolLM2's of 576.
    published = Recipe.load("kphi3").model_dump(exclude_unset=True)
    for rule in published["replace"]:
        rule["min_channels_per_group"] = 48
    out = tmp_path / "slim"
    report = llmslim.convert(tmp_path / "phi3", published, out).report
    replaced = [row for row in report.rows if row.action == "replaced"]
    assert len(replaced) == 120
    assert {row.options["groups"] for row in replaced} == {12, 32}
    check_in_a_fresh_process(out, tmp_path)


def test_a_light_model_still_answers(tmp_path: Path) -> None:
    """Fitted to its own text, which has conversations in its template."""
    done = llmslim.convert(
        gguf_file(), demo.demo_recipe(), tmp_path / "slim", calibration_tokens=8_192
    )
    capital, *others = answers(llmslim.load(done.path), AutoTokenizer.from_pretrained(done.path))
    assert "Paris" in capital
    # A model that has forgotten to chat answers everything with its own system prompt.
    assert not any("helpful AI assistant" in answer for answer in (capital, *others))
