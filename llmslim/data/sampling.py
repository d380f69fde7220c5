"""Text sampled from the dense model itself: calibration data without a download.

Half of the sequences begin with a token drawn from the whole vocabulary; the next four are the
likeliest ones, which leads the model from anything to something sensible, and the rest is sampled
at temperature 1, so that the text is distributed as the model expects it (LLM-QAT, Liu et al.
2023, https://arxiv.org/abs/2305.17888, section 3.1). Where the tokenizer has a chat template, the
other half begin as a conversation in which the user has said one of a few openers.

All rows advance in step from their first token on; while a row is in its prompt, the prompt's
token is taken instead of the drawn one. So prompts may differ in length without padding, and
nothing beyond a key-value cache is asked of a model. A model in float32 is sampled in bfloat16
where the machine is fast at it: what matters here is that the text is typical, not each digit.

What was sampled is kept in the user's cache folder, and read again for the same model and numbers.

Shapes: N windows of L tokens; B rows of T tokens, sampled at once; V = size of the vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors.torch import load, save
from torch import Tensor, nn

from llmslim.compat import CONFIG_ORIGIN
from llmslim.errors import DataError
from llmslim.progress import Progress

from .messages import mended
from .vocabulary import check_ids, embedding_rows

OPENERS = (
    "Hello!",
    "Tell me something interesting.",
    "Explain how something works.",
    "Write a short story.",
    "Give me some advice.",
    "What happened in history on this day?",
    "Write a small program and explain it.",
    "Solve a simple maths problem step by step.",
    "Summarise a well-known book.",
    "Make a list of ideas.",
    "Compare two things.",
    "Describe a place.",
)
_LONGEST = 128  # the cost of a token grows with the tokens before it
_MOST_ROWS = 256
_CACHE_BYTES = 2**31
_GREEDY = 4
_ALGORITHM = 1  # raised by whoever changes what is sampled: it is part of the cache's key


def leading_token(tokenizer: Any) -> int | None:
    """Return the token that a tokenizer puts before every text, None if it puts none."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def longest_input(model: Any) -> int | None:
    """Return how many tokens a model reads at most, None where its config sets no limit."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest if longest and longest > 0 else None  # XLNet has -1


def sampled_windows(
    model: Any,
    tokenizer: Any,
    count: int,
    length: int,
    seed: int,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """Sample windows from a model, or read them from the cache.

    Args:
        model: the dense model, in any float type, on any device; it is left as it is.
        tokenizer: its tokenizer, or None: then no row is a conversation.
        count: number of windows.
        length: tokens of one window; above 128, several samples make up one.
        seed: the same seed gives the same windows, on the same kind of machine.
        progress: called with tokens done, tokens in all, and `sampling`.

    Returns:
        Ids, (count, length), int64, on the CPU.

    Raises:
        DataError: if the model's logits are not finite.
    """
    key = fingerprint(model, tokenizer, count, length, seed)
    path = cache_folder() / f"{key}.safetensors"
    kept = _read(path, count, length)
    if kept is not None:
        return kept
    pieces = math.ceil(length / _LONGEST)
    steps = math.ceil(length / pieces)
    total = count * pieces
    generator = torch.Generator().manual_seed(seed)
    prompts = opening_prompts(model, tokenizer, total, generator)
    rows = min(_MOST_ROWS, max(1, _CACHE_BYTES // (steps * _cache_bytes_per_token(model))))
    done: list[Tensor] = []
    with for_sampling(model) as sampler:
        for start in range(0, total, rows):
            batch = prompts[start : start + rows]

            def report(step: int, start: int = start, size: int = len(batch)) -> None:
                if progress is not None:
                    progress(start * steps + step * size, total * steps, "sampling")

            done.append(_sample(sampler, batch, steps, generator, report))
    ids_NL = torch.cat(done).view(count, pieces * steps)[:, :length].contiguous()
    _write(path, ids_NL)
    return ids_NL


def opening_prompts(
    model: Any, tokenizer: Any, rows: int, generator: torch.Generator
) -> list[tuple[list[int], int]]:
    """Return each row's first tokens, and how many after them are the likeliest ones.

    Args:
        model: says how large the vocabulary is.
        tokenizer: its tokenizer, or None: then no row is a conversation.
        rows: how many to draw.
        generator: what draws them.
    """
    vocabulary = embedding_rows(model) or len(tokenizer)
    special: set[int] = set()
    first: list[int] = []
    chats: list[list[int]] = []
    if tokenizer is not None:
        vocabulary = min(vocabulary, len(tokenizer))  # embeddings are often padded
        special = set(tokenizer.all_special_ids)
        leading = leading_token(tokenizer)
        check_ids([leading or 0], tokenizer, vocabulary, "data: self: every text")
        first = [] if leading is None else [leading]
        chats = list(_chats(tokenizer, vocabulary))
    allowed = [token for token in range(vocabulary) if token not in special]
    prompts = []
    for row in range(rows):
        choices = len(chats) if chats and row % 2 else len(allowed)
        drawn = int(torch.randint(choices, (), generator=generator))
        chat = bool(chats and row % 2)
        prompts.append((chats[drawn], 0) if chat else ([*first, allowed[drawn]], _GREEDY))
    return prompts


def _chats(tokenizer: Any, vocabulary: int) -> Iterator[list[int]]:
    """Yield the ids of each opener in the tokenizer's chat template."""
    if not getattr(tokenizer, "chat_template", None):
        return
    for opener in OPENERS:
        with suppress(TemplateError):  # a template for something else than conversation
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": opener}], tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(mended(text), add_special_tokens=False)["input_ids"]
            if ids and max(ids) < vocabulary:
                yield ids


@torch.inference_mode()
def _sample(
    model: Any,
    prompts: list[tuple[list[int], int]],
    steps: int,
    generator: torch.Generator,
    report: Callable[[int], None],
) -> Tensor:
    """Return one sequence for each prompt, (B, T), its first tokens those of the prompt.

    Raises:
        DataError: if the model's logits are not finite.
    """
    forced_BT = torch.full((len(prompts), steps), -1)
    greedy_BT = torch.zeros(len(prompts), steps, dtype=torch.bool)
    for row, (prompt, greedy) in enumerate(prompts):
        forced_BT[row, : len(prompt)] = torch.tensor(prompt[:steps])
        greedy_BT[row, len(prompt) : len(prompt) + greedy] = True
    ids_BT = forced_BT.clone()
    cache = None
    for step in range(1, steps):
        output = model(
            ids_BT[:, step - 1 : step].to(model.device), past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        next_B = draw(output.logits[:, -1].float(), greedy_BT[:, step], generator)
        forced_B = forced_BT[:, step]
        ids_BT[:, step] = torch.where(forced_B >= 0, forced_B, next_B)
        report(step + 1)
    return ids_BT


def draw(logits_BV: Tensor, greedy_B: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a token for each row: the likeliest where it says greedy.

    Args:
        logits_BV: of the next token, float32.
        greedy_B: which rows take the likeliest one.
        generator: gives one random number a row.

    Returns:
        Ids, (B,), on the CPU.

    Raises:
        DataError: if logits are not finite.
    """
    likeliest_B = logits_BV.argmax(-1).cpu()
    # By the inverse of the distribution: one random number a row, where torch.multinomial takes V.
    sums_BV = logits_BV.softmax(-1).cumsum(-1)
    last_B1 = sums_BV[:, -1:]
    if not last_B1.isfinite().all():
        raise DataError(
            "data: self, but the model's logits are not finite, so nothing can be sampled from it. "
            "Check its weights and their type (float16 overflows: --dtype), or name a file."
        )
    at_B1 = torch.rand(len(logits_BV), 1, generator=generator).to(last_B1) * last_B1
    # The first sum above the number, so that a token of probability 0 is never drawn.
    drawn_B = torch.searchsorted(sums_BV, at_B1, right=True).squeeze(1).cpu()
    return torch.where(greedy_B | (drawn_B >= logits_BV.shape[-1]), likeliest_B, drawn_B)


@contextmanager
def for_sampling(model: Any) -> Iterator[Any]:
    """Lend the model in evaluation mode, or a copy in bfloat16 where that is faster."""
    on_cpu = model.device.type == "cpu"
    fast = on_cpu and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if model.dtype == torch.float32 and (fast or model.device.type == "cuda"):
        # Given as done already, the weights are not copied in float32 on the way.
        narrow = {
            id(old): nn.Parameter(old.detach().to(torch.bfloat16), requires_grad=False)
            for old in model.parameters()
        }
        sampler = copy.deepcopy(model, narrow).eval()
        if on_cpu:
            # On a CPU the fused kernel is made for many queries; for one it takes twice as long.
            sampler.set_attn_implementation("eager")
        yield sampler
        return
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in training.items():
            module.training = mode


def _cache_bytes_per_token(model: Any) -> int:
    """Return an upper bound of what the key-value cache takes for one token of one row."""
    config = model.config.get_text_config()
    return int(config.num_hidden_layers * 2 * config.hidden_size * 4)


def cache_folder() -> Path:
    """Return the folder in the user's cache where sampled text is kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llmslim" / "self"


def fingerprint(model: Any, tokenizer: Any, *numbers: int) -> str:
    """Return a key of everything that what is sampled depends on; of weights, some of each.

    Args:
        model: the dense model.
        tokenizer: its tokenizer, if it has one.
        *numbers: how much is sampled, the seed, and the like.
    """
    config = model.config.to_dict()
    for origin in CONFIG_ORIGIN:
        config.pop(origin, None)
    words = None
    if tokenizer is not None:
        chats = list(_chats(tokenizer, len(tokenizer)))
        words = [len(tokenizer), leading_token(tokenizer), tokenizer.all_special_ids, chats]
    about = [_ALGORITHM, numbers, model.device.type, config, words]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        some = weight.detach().reshape(-1)[:: max(1, weight.numel() // 4096)]
        digest.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _read(path: Path, count: int, length: int) -> Tensor | None:
    """Return the windows kept in a file, None if it is not there or not what was written."""
    try:
        ids = load(path.read_bytes())["ids"]
    except Exception:  # not there, cut short, something else: it is sampled again
        return None
    return ids.long() if ids.shape == (count, length) and not ids.is_floating_point() else None


def _write(path: Path, ids_NL: Tensor) -> None:
    """Keep windows in a file, whole or not at all; a cache that cannot be written is no error."""
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(save({"ids": ids_NL.int()}))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
