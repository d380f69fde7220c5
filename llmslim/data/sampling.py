"""Free text sampled from the dense model itself: calibration data without a download.

Each sequence begins with a token drawn from the whole vocabulary; the next four are the likeliest
ones, which leads the model from anything to something sensible, and the rest is sampled at
temperature 1, so that the text is distributed as the model expects it (LLM-QAT, Liu et al. 2023,
https://arxiv.org/abs/2305.17888, section 3.1). Conversations are sampled in conversations.py.

All rows advance together from their first token; while a row is in its prompt, the prompt's
token is taken instead of the drawn one. So prompts may differ in length without padding, and a
model needs nothing but a key-value cache. A model in float32 is sampled in bfloat16 where the
machine is fast at it: the text has to be typical, not exact to each digit.

What was sampled is kept in the user's cache folder, and read again for the same model and numbers.

Shapes: N windows of L tokens; B rows, sampled together; V = size of the vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from llmslim.atomic import new_file
from llmslim.compat import CONFIG_ORIGIN, plain_attention, register_attention
from llmslim.errors import DataError
from llmslim.progress import Progress

from .vocabulary import check_ids, embedding_rows, leading_token

_LONGEST = 128  # the cost of a token grows with the tokens before it
_MOST_ROWS = 256
CACHE_BYTES = 2**31
"""How much memory the key-value cache may take."""
_GREEDY = 4
_ONE_QUERY = "llmslim_one_query"
_POSITIONS = {"position_ids", "cache_position"}
_SHRINK_AT = 0.75  # ended rows leave the batch when at most this share has not ended
_ALGORITHM = 2  # raise it with every change of what is sampled: it is part of the cache's key

Steps = Generator[int, int, None]
"""Yields a row's next token, and is sent the one that the model drew to follow it."""


@dataclass
class SampledRow:
    """One row of a batch that is sampled."""

    steps: Steps
    greedy: range = range(0)
    """At which positions the likeliest token is taken."""
    ids: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def drawn(self) -> int:
        """Tokens of it, the one that ended it included."""
        return len(self.ids) + self.ended

    def advance(self, drawn: int) -> None:
        """Append the next token, if the row has not ended."""
        if not self.ended:
            try:
                self.ids.append(self.steps.send(drawn))
            except StopIteration:
                self.ended = True


def write_from(opening: Sequence[int], stops: frozenset[int]) -> Steps:
    """Yield the tokens of a text that begins with `opening`, up to one of `stops`."""
    for token in opening:
        drawn = yield token
    while drawn not in stops:
        drawn = yield drawn


@torch.inference_mode()
def sample_rows(
    model: Any,
    rows: Sequence[SampledRow],
    longest: int,
    generator: torch.Generator,
    report: Callable[[int], None],
) -> None:
    """Let all rows advance together until they have ended or are too long.

    Args:
        model: one that `for_sampling` gave.
        rows: B of them; their `ids` grow.
        longest: tokens of a row.
        generator: gives one random number for each row and position.
        report: called with the tokens of all rows.

    Raises:
        DataError: if the model's logits are not finite.
    """
    for row in rows:
        row.ids.append(next(row.steps))
    going, cache = list(rows), None
    for position in range(1, longest):
        ids_B1 = torch.tensor([[row.ids[-1]] for row in going], device=model.device)
        output = model(ids_B1, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        greedy_B = torch.tensor([position in row.greedy for row in going])
        drawn_B = draw(output.logits[:, -1].float(), greedy_B, generator)
        for row, token in zip(going, drawn_B.tolist(), strict=True):
            row.advance(token)
        report(sum(row.drawn for row in rows))
        left = [index for index, row in enumerate(going) if not row.ended]
        if not left:
            return
        if len(left) <= _SHRINK_AT * len(going):
            cache.batch_select_indices(torch.tensor(left, device=model.device))
            going = [going[index] for index in left]


def sampled_windows(
    model: Any,
    tokenizer: Any,
    count: int,
    length: int,
    seed: int,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """Sample windows of free text from a model, or read them from the cache.

    Args:
        model: the dense model, in any float type, on any device; it is left as it is.
        tokenizer: its tokenizer, or None: then any token may be the first of a text.
        count: number of windows, N.
        length: tokens of one window, L; above 128, several samples make up one.
        seed: the same seed gives the same windows, on the same kind of machine.
        progress: called with tokens done, tokens in all, and `sampling`.

    Returns:
        Ids, (N, L), int64, on the CPU.

    Raises:
        DataError: if the model's logits are not finite.
    """
    path = cache_folder() / f"{fingerprint(model, tokenizer, count, length, seed)}.safetensors"
    with suppress(Exception):  # not there, cut short, anything else: it is sampled again
        kept = load(path.read_bytes())["ids"]
        if kept.shape == (count, length) and not kept.is_floating_point():
            return kept.long()
    pieces = math.ceil(length / _LONGEST)
    steps = math.ceil(length / pieces)
    generator = torch.Generator().manual_seed(seed)
    rows = [
        SampledRow(write_from(opening, frozenset()), greedy)
        for opening, greedy in opening_prompts(model, tokenizer, count * pieces, generator)
    ]
    config = model.config.get_text_config()
    token_bytes = config.num_hidden_layers * 2 * config.hidden_size * 4  # an upper bound
    at_once = min(_MOST_ROWS, max(1, CACHE_BYTES // (steps * token_bytes)))
    with for_sampling(model) as sampler:
        for start in range(0, len(rows), at_once):

            def report(done: int, start: int = start) -> None:
                if progress is not None:
                    progress(start * steps + done, len(rows) * steps, "sampling")

            sample_rows(sampler, rows[start : start + at_once], steps, generator, report)
    ids_NL = torch.tensor([row.ids for row in rows]).view(count, -1)[:, :length].contiguous()
    keep(path, save({"ids": ids_NL.int()}))
    return ids_NL


def opening_prompts(
    model: Any, tokenizer: Any, rows: int, generator: torch.Generator
) -> list[tuple[list[int], range]]:
    """Return each row's first tokens, and at which positions after them to take the likeliest.

    Args:
        model: gives the size of the vocabulary.
        tokenizer: its tokenizer, or None: then any token may be the first.
        rows: how many to draw.
        generator: draws them.

    Raises:
        DataError: if the model has no embedding for the token that begins every text.
    """
    vocabulary = embedding_rows(model) or len(tokenizer)
    special: set[int] = set()
    first: list[int] = []
    if tokenizer is not None:
        vocabulary = min(vocabulary, len(tokenizer))  # embeddings are often padded
        special = set(tokenizer.all_special_ids)
        leading = leading_token(tokenizer)
        check_ids([leading or 0], tokenizer, vocabulary, "data: self: every text")
        first = [] if leading is None else [leading]
    allowed = [[*first, token] for token in range(vocabulary) if token not in special]
    prompts = []
    for _ in range(rows):
        opening = allowed[int(torch.randint(len(allowed), (), generator=generator))]
        prompts.append((opening, range(len(opening), len(opening) + _GREEDY)))
    return prompts


def draw(logits_BV: Tensor, greedy_B: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a token for each row.

    Args:
        logits_BV: of the next token, float32.
        greedy_B: which rows take the likeliest token instead.
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
    """Give the model in evaluation mode, or a copy for one token at a time where that is faster.

    On a CPU a copy shares the weights; a copy of a float32 model is in bfloat16 where the machine
    is fast at it.
    """
    on_cpu = model.device.type == "cpu"
    fast = on_cpu and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    narrow = model.dtype == torch.float32 and (fast or model.device.type == "cuda")
    if narrow or on_cpu:
        # Entered as copied already, weights are shared, or narrowed without a copy in float32.
        known = {
            id(old): nn.Parameter(old.detach().to(torch.bfloat16), requires_grad=False)
            if narrow
            else old
            for old in model.parameters()
        }
        sampler = copy.deepcopy(model, known).eval()
        if on_cpu:
            _attend_with_one_query(sampler)
        yield sampler
        return
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in training.items():
            module.training = mode


def _attend_with_one_query(model: Any) -> None:
    """Let a model attend by products made for one query, where its class leaves that open.

    transformers' own copy the keys and values of a group for each of its heads, for every token;
    on a CPU that is most of the time. For one query the heads of a group can be its queries.
    """
    register_attention(_ONE_QUERY, _one_query)
    attentions = [each for each in model.modules() if hasattr(each, "num_key_value_groups")]
    grouped = any(each.num_key_value_groups > 1 for each in attentions)
    open_to_it = grouped and all(plain_attention(each) for each in attentions)
    model.set_attn_implementation(_ONE_QUERY if open_to_it else "eager")


def _one_query(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers' eager attention does: query (B, heads, 1, D) to (B, 1, heads, D)."""
    eager = plain_attention(module)
    assert eager is not None  # as _attend_with_one_query has made sure
    rows, heads, queries, _ = query.shape
    groups = heads // key.shape[1]
    # A mask or another tensor may differ from head to head: biases of positions, sinks.
    by_head = any(
        isinstance(value, Tensor) for name, value in options.items() if name not in _POSITIONS
    ) or (attention_mask is not None and attention_mask.shape[1] > 1)
    if groups == 1 or queries > 1 or by_head:
        return eager(module, query, key, value, attention_mask, **options)
    was, module.num_key_value_groups = module.num_key_value_groups, 1
    try:
        grouped = query.view(rows, key.shape[1], groups, -1)
        out, weights = eager(module, grouped, key, value, attention_mask, **options)
    finally:
        module.num_key_value_groups = was
    return out.transpose(1, 2).reshape(rows, 1, heads, -1), weights


def cache_folder(what: str = "self") -> Path:
    """Return a folder in the user's cache; sampled text is kept in `self`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llmslim" / what


def keep(path: Path, data: bytes) -> None:
    """Keep data in the cache; a cache that cannot be written is no error."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            file.write(data)


def fingerprint(model: Any, tokenizer: Any, *more: Any) -> str:
    """Return a key of all that sampled text depends on; of each weight, of at most 4,096 values.

    Args:
        model: the dense model.
        tokenizer: its tokenizer, if it has one.
        *more: how much is sampled, the seed, and the like, as JSON has it.
    """
    config = model.config.to_dict()
    for origin in CONFIG_ORIGIN:
        config.pop(origin, None)
    words = None
    if tokenizer is not None:
        words = [len(tokenizer), leading_token(tokenizer), tokenizer.all_special_ids]
    about = [_ALGORITHM, more, model.device.type, config, words]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        some = weight.detach().reshape(-1)[:: max(1, weight.numel() // 4096)]
        digest.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
