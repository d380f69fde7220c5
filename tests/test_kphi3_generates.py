"""A kphi-3 checkpoint in transformers' own pipeline, with the settings of the report's notebook."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_cli import _restore_logging as _restore_logging
from helpers_cli import write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config, pipeline
from transformers.utils import is_flash_attn_2_available

from llmslim import api
from llmslim.compat import attention_of

RECIPE = {
    "depth": {"keep_layers": 2},
    "width": {"intermediate_size": 288},
    "replace": [
        {
            "role": ["attention", "mlp"],
            "structure": "grouped_pointwise",
            "min_channels_per_group": 24,
        }
    ],
}
SETTINGS = {"max_new_tokens": 256, "do_sample": True, "top_p": 0.5, "repetition_penalty": 1.2}


@pytest.fixture(scope="module")
def kphi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kphi3")
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4}
    tokens = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    Phi3Config(**sizes, **tokens, num_hidden_layers=3).save_pretrained(folder / "bare")
    write_tokenizer(folder / "bare")
    return api.convert(folder / "bare", RECIPE, folder / "slim", init="random").path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_pipeline_writes_with_the_reports_settings(
    kphi3: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    writer = pipeline(
        "text-generation",
        model=str(kphi3),
        dtype=dtype,
        device="cpu",
        model_kwargs={"attn_implementation": "sdpa"},
    )
    assert type(writer.model).__name__ == "SlimPhi3ForCausalLM"
    assert {p.dtype for p in writer.model.parameters()} == {dtype}
    assert attention_of(writer.model.config) == "sdpa"
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
    torch.manual_seed(0)
    (found,) = writer("w1 w2 w3", return_tensors=True, **SETTINGS)
    ids = found["generated_token_ids"]
    assert ids[:3] == AutoTokenizer.from_pretrained(kphi3)("w1 w2 w3")["input_ids"]
    assert len(ids) == 3 + 256  # no token ends a text here
    (found,) = writer("w1 w2 w3", **{**SETTINGS, "max_new_tokens": 4})
    assert found["generated_text"].startswith("w1 w2 w3")


def test_half_precision_computes_nearly_the_same(kphi3: Path) -> None:
    ids = torch.arange(3, 19)[None]
    exact, half = (
        AutoModelForCausalLM.from_pretrained(kphi3, dtype=dtype)(ids, use_cache=False).logits
        for dtype in (torch.float32, torch.float16)
    )
    assert half.dtype == torch.float16
    assert torch.allclose(exact, half.float(), atol=0.02 * float(exact.detach().std()))


# Reason to skip: the error under test is that of a machine without the package.
@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_flash_attention_without_its_package_is_transformers_own_error(kphi3: Path) -> None:
    with pytest.raises(ImportError) as dense:
        AutoModelForCausalLM.from_config(
            Phi3Config(num_hidden_layers=1, hidden_size=96, vocab_size=8, pad_token_id=0),
            attn_implementation="flash_attention_2",
        )
    with pytest.raises(ImportError) as slim:
        AutoModelForCausalLM.from_pretrained(kphi3, attn_implementation="flash_attention_2")
    assert type(slim.value) is type(dense.value)
    assert str(slim.value).partition("FlashAttention2")[1]
