"""What a model says to a few fixed prompts, for the eye: numbers are measured elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmslim.data import embedding_rows, longest_input, mended
from llmslim.healing.restoring import evaluating

PROMPTS = (
    "What is the capital of France?",
    "Give three tips for staying healthy.",
    "Explain in one sentence why the sky is blue.",
)
_LENGTH = 48


@torch.no_grad()  # inference_mode would leave tensors behind that a sharded model cannot train on
def answers(model: Any, tokenizer: Any) -> list[str]:
    """Return the likeliest answer to each of `PROMPTS`; empty where there is no tokenizer.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; its chat template is used where it has one.
    """
    if tokenizer is None:
        return []
    with evaluating(model):
        return [_answer(model, tokenizer, prompt) for prompt in PROMPTS]


def _answer(model: Any, tokenizer: Any, prompt: str) -> str:
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        inputs = tokenizer(
            mended(text), add_special_tokens=False, return_tensors="pt", return_token_type_ids=False
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    length = inputs["input_ids"].shape[-1]
    longest = longest_input(model)
    room = _LENGTH if longest is None else min(_LENGTH, longest - length)
    if length == 0 or room < 1 or not _known(inputs["input_ids"], model):
        return ""
    pad = tokenizer.pad_token_id
    ids = model.generate(
        **inputs.to(model.device),
        max_new_tokens=room,
        use_cache=True,
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    return str(tokenizer.decode(ids[0, length:], skip_special_tokens=True)).strip()


def _known(ids: Tensor, model: Any) -> bool:
    """Tell whether a model has an embedding for every token: a chat template may have others."""
    rows = embedding_rows(model)
    return rows is None or int(ids.max()) < rows
