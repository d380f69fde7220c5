"""GGUF files in llama.cpp itself, where it is there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers_gguf import bpe_tokenizer, gemma, long_phi3, narrowed, partial_phi3, with_rope, write
from tiny import tiny_model, tokens

MODELS = {
    "llama": lambda: tiny_model("llama"),
    "llama, widths": lambda: narrowed("llama"),
    "llama, heads of another size": lambda: narrowed("llama", head_dim=16),
    "llama, rope": lambda: with_rope("llama3"),
    "llama, rope and widths": lambda: with_rope("llama3", narrow=True),
    "llama, linear rope": lambda: with_rope("linear", narrow=True),
    "mistral, widths": lambda: narrowed("mistral", sliding_window=None),
    "qwen2": lambda: tiny_model("qwen2"),
    "qwen2, widths": lambda: narrowed("qwen2"),
    "qwen3": lambda: narrowed("qwen3"),
    "phi3": lambda: tiny_model("phi3"),
    "phi3, widths": lambda: narrowed("phi3"),
    "phi3, partial rotation": partial_phi3,
    "phi3, longrope": long_phi3,
    "gemma": lambda: narrowed("gemma"),
    "gemma2": lambda: gemma("gemma2"),
    "gemma3": lambda: gemma("gemma3"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_writes_the_same_tokens(tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec("xllamacpp") is None:
        # Reason to skip: llama.cpp is no dependency; other tests hold the file by definition.
        pytest.skip("needs llama.cpp: pip install xllamacpp")
    import xllamacpp as cpp

    model = MODELS[name]()
    out = write(model, tmp_path / "m.gguf", bpe_tokenizer(), quantize="f32")
    ids = tokens(1, 20)[0].clamp(min=2).tolist()
    settings = cpp.CommonParams()
    settings.model.path = str(out)
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 256, 1, False, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    request = {"prompt": ids, "max_tokens": 16, "temperature": 0.0, "ignore_eos": True}
    answer = cpp.Server(settings).handle_completions({**request, "logprobs": 1})
    found = answer["choices"][0]["logprobs"]["content"]
    wanted = model.generate(
        torch.tensor([ids]),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=[1],  # the end, which llama.cpp is asked to ignore
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = wanted.sequences[0, 20:].tolist()
    assert [token["id"] for token in found] == new
    likely = [row[0].log_softmax(0)[i].item() for row, i in zip(wanted.logits, new, strict=True)]
    # llama.cpp looks GELU up in a table of float16.
    close = 2e-3 if name.startswith("gemma") else 1e-5
    assert [token["logprob"] for token in found] == pytest.approx(likely, abs=close)
