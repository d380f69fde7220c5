"""Ask a model something and stream its answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer

from llmslim.errors import DataError


class _Stream(TextStreamer):
    """Passes finished pieces of text to a function instead of printing them."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass text to the function."""
        self.write(text + "\n" if stream_end else text)


def reply(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    write: Callable[[str], None],
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int | None = None,
) -> tuple[int, float]:
    """Generate an answer to `prompt`.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer; its chat template is used where it has one.
        prompt: the user's message.
        write: takes the answer, piece by piece.
        system: a system message; needs a chat template.
        max_new_tokens: maximum number of new tokens.
        temperature: 0 takes the likeliest token each time.
        seed: makes a temperature above 0 repeatable.

    Returns:
        The number of new tokens, and seconds.

    Raises:
        DataError: if the chat template has no place for the system message, or the prompt is empty.
    """
    inputs = _encode(tokenizer, prompt, system).to(model.device)
    if seed is not None:
        torch.manual_seed(seed)
    # Greedy decoding has no temperature; generate() warns about options that it does not use.
    unset = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    sampling = {"do_sample": True, "temperature": temperature} if temperature else unset
    start = time.perf_counter()
    with torch.inference_mode():
        ids = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=_pad_token(model, tokenizer),
            streamer=_Stream(tokenizer, write),
            **sampling,
        )
    return ids.shape[-1] - inputs["input_ids"].shape[-1], time.perf_counter() - start


def _encode(tokenizer: Any, prompt: str, system: str | None) -> Any:
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # templates are programs, which raise anything
            reason = str(error).partition("\n")[0]
            raise DataError(
                f"chat template: fails for this prompt ({reason}). Correct it, or remove it from "
                "the model's folder to give the prompt without a template."
            ) from error
    if system is not None:
        raise DataError(
            "--system: this model's tokenizer has no chat template, which a system message needs. "
            "Write it into the prompt."
        )
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[-1] == 0:
        raise DataError("PROMPT: has no tokens; at least one is needed. Write something.")
    return inputs


def _pad_token(model: Any, tokenizer: Any) -> int | None:
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    eos: int | list[int] | None = model.generation_config.eos_token_id
    return eos[0] if isinstance(eos, list) else eos
