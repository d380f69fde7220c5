"""Measure a model: its loss on held-out text, and answers to a few fixed prompts.

Healing decides by the loss; the answers are for people.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llmslim.anatomy.predictions import summed_cross_entropy
from llmslim.data import embedding_rows, longest_input, replace_surrogates
from llmslim.healing.objectives import next_tokens
from llmslim.healing.restoring import evaluating
from llmslim.healing.rows import Collate

PROMPTS = (
    "What is the capital of France?",
    "Give three tips for staying healthy.",
    "Explain in one sentence why the sky is blue.",
)
_LENGTH = 48


@torch.no_grad()
def held_out_loss(
    model: Any,
    rows: Dataset[dict[str, Tensor]],
    collate: Collate,
    *,
    micro_batch: int,
    accelerator: Any,
) -> float:
    """Return the mean of -log p(next token) over all predicted tokens, in nats.

    Every process takes its share of the rows, and all return the same number. All call the model
    equally often, which sharded models need.

    Args:
        model: any causal language model, perhaps wrapped.
        rows: what to predict.
        collate: makes a batch of some rows.
        micro_batch: rows of one call.
        accelerator: accelerate's, for the processes and the sum over them.
    """
    total = torch.zeros(2, dtype=torch.float64)
    count = len(rows)  # type: ignore[arg-type]
    stride = micro_batch * accelerator.num_processes
    with evaluating(model):
        for start in range(0, count, stride):
            first = start + accelerator.process_index * micro_batch
            mine = range(first, min(first + micro_batch, count))
            batch = collate([rows[index] for index in mine or [0]])
            labels_NL = batch.pop("labels").to(accelerator.device)
            if not mine:  # this call only keeps up with the other processes
                labels_NL.fill_(-100)
            inputs = {key: value.to(accelerator.device) for key, value in batch.items()}
            logits_NLV = model(**inputs, use_cache=False).logits
            targets_NL = next_tokens(labels_NL)
            total[0] += float(summed_cross_entropy(logits_NLV, targets_NL))
            total[1] += int((targets_NL != -100).sum())
    # Some devices have no float64; the loss of precision is below the eighth digit.
    total = accelerator.reduce(total.float().to(accelerator.device), "sum").cpu()
    return float(total[0] / total[1].clamp(min=1))


@torch.no_grad()  # a sharded model cannot train on tensors of inference_mode
def answers(model: Any, tokenizer: Any) -> list[str]:
    """Return the greedy answer to each of `PROMPTS`; empty without a tokenizer.

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
            replace_surrogates(text),
            add_special_tokens=False,
            return_tensors="pt",
            return_token_type_ids=False,
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
    """Return whether a model has an embedding for every token, also those of a chat template."""
    rows = embedding_rows(model)
    return rows is None or int(ids.max()) < rows
