"""Turn text into windows of token ids, some of them held out.

Documents are tokenised, joined with the end-of-sequence token between them, and the stream is cut
into windows of equal length; so nothing is padded, and every position counts the same. Where the
tokenizer begins a text with a special token, every window begins with it, as every text that the
model will see does.

Of a file or data set at most four times the needed tokens are read; the windows are drawn from
those. Several texts are each cut alone, and their windows shuffled together.

The dense model's own text is two such texts where its tokenizer has a chat template: half of it
are conversations in that template (conversations.py), since an instruct model that is fitted
without them forgets how to chat; the other half is free text (sampling.py).

Shapes: N and M windows of L tokens.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmslim.errors import DataError
from llmslim.progress import Progress
from llmslim.recipe.schema import Calibration

from .columns import RowReader, check_left_out
from .conversations import can_converse, rows_for, sampled_conversations
from .prompts import Encoder
from .sampling import sampled_windows
from .sources import read_texts
from .vocabulary import check_ids, embedding_rows, leading_token, longest_input

OWN_TEXT = "the dense model's own text"
"""The name of `self` in reports."""
_POOL = 4
_SAMPLED = (9 / 8, 2, 4)
"""How much to sample of conversations, in needed tokens; the next where the last was too little."""
_CHARACTERS_PER_TOKEN = 8  # more than text has, so that a stretch of a text is long enough
_BATCH = 64


@dataclass(frozen=True)
class Windows:
    """Tokens to fit to, and tokens to judge the fit by."""

    ids: Tensor
    """Windows to fit to, (N, L), int64."""
    source: str
    """Where they are from: names of files and data sets, `OWN_TEXT`, with commas between."""
    held_out: Tensor
    """Windows to judge by, (M, L), int64; M is about N / 15."""
    notes: tuple[str, ...] = ()
    """Sentences about what was left out or changed."""

    @property
    def description(self) -> str:
        """What a report shows of them."""
        return (
            f"{self.ids.numel():,} tokens of {self.source}, with errors measured on "
            f"{self.held_out.numel():,} others"
        )


def calibration_windows(
    spec: Calibration, tokenizer: Any, model: Any = None, *, progress: Progress | None = None
) -> Windows:
    """Return the windows of a recipe's `calibration` section.

    Args:
        spec: which data, how many tokens, how long the windows are, and the seed.
        tokenizer: the model's; `self` works without one.
        model: the dense model: `self` samples from it; no window may be longer than it reads, nor
            have tokens that it has no embedding for.
        progress: called with tokens done, tokens in all, and the name of the work.

    Returns:
        ceil(tokens / L) windows, at least two, of which one in 16 is held out, in one stretch: at
        least one and at most 16. Fewer, with a note, where there is less text. The same of each of
        several texts, with its share of the tokens, and of each half of `self`; that is all free
        text where a half would be less than two windows.

    Raises:
        DataError: if the data cannot be read, is too short for two windows, is named twice, or the
            windows are longer than the model reads or have tokens that it does not know.
    """
    length = spec.sequence_length
    longest = None if model is None else longest_input(model)
    if length < 2:
        raise DataError(
            f"calibration.sequence_length: {length}; a window needs 2 tokens or more. "
            "Something like 1024 is usual."
        )
    if longest is not None and length > longest:
        raise DataError(
            f"calibration.sequence_length: {length}; the model reads at most {longest} tokens "
            f"(max_position_embeddings). Write {longest} or less."
        )
    for data in spec.texts:
        if spec.texts.count(data) > 1:
            raise DataError(f"calibration.data: {data} is named twice. Name each text once.")
    share = math.ceil(spec.tokens / len(spec.texts))
    each = spec.model_copy(update={"tokens": share})
    parts = [
        _read_windows(data, each, tokenizer, model, progress)
        for data in spec.texts
        if data != "self"
    ]
    # Last: text that cannot be read is found before a model writes for minutes.
    if "self" in spec.texts:
        parts += _own_windows(each, tokenizer, model, progress)
    return parts[0] if len(parts) == 1 else _shuffled(parts, spec.seed)


def _shuffled(parts: Sequence[Windows], seed: int) -> Windows:
    """Return the windows of several texts, so that the first few alone are of every text."""
    draw = random.Random(seed)
    ids_NL, held_out = (
        windows[draw.sample(range(len(windows)), len(windows))]
        for windows in (
            torch.cat([part.ids for part in parts]),
            torch.cat([part.held_out for part in parts]),
        )
    )
    source = ", ".join(dict.fromkeys(part.source for part in parts))
    notes = tuple(note for part in parts for note in part.notes)
    return Windows(ids_NL, source, held_out, notes)


def first_windows(
    data: str, count: int, length: int, tokenizer: Any, model: Any = None
) -> tuple[str, Tensor]:
    """Return the first windows of a text, to score models on.

    Args:
        data: a file or a data set, as for calibration; rows come in one fixed random order.
        count: number of windows, N; fewer where there is less text.
        length: tokens of a window, L.
        tokenizer: the model's.
        model: no window may have tokens that it has no embedding for, nor be longer than it reads.

    Returns:
        The name of the text, and ids, (N, L), int64.

    Raises:
        DataError: if it cannot be read, or has no window.
    """
    longest = None if model is None else longest_input(model)
    if length < 2 or (longest is not None and length > longest):
        most = "" if longest is None else f" and at most {longest}, which is what the model reads"
        raise DataError(f"length: {length}; a window needs at least 2 tokens{most}.")
    local = Path(data).expanduser()
    source = local.name if local.is_file() else data
    pool = count * (length - (leading_token(tokenizer) is not None))
    reader, encoder = RowReader(), Encoder(tokenizer)
    documents = read_texts(data, reader=reader)
    batches = iter(lambda: list(itertools.islice(documents, _BATCH)), [])
    texts = ([encoder.text(one) for one in batch] for batch in batches)
    stream = _tokenise(texts, pool, tokenizer, None)
    check_left_out(source, reader.left_out, reader.rows, reader.notes(source))
    ids_NL = _cut(stream, length, tokenizer, model, source)
    if not len(ids_NL):
        raise DataError(f"{data}: {len(stream)} tokens; a window takes {length}. Give more text.")
    return source, ids_NL


def _read_windows(
    data: str, spec: Calibration, tokenizer: Any, model: Any, progress: Progress | None
) -> Windows:
    """Return the windows of a file or a data set.

    Raises:
        DataError: as `calibration_windows`.
    """
    if tokenizer is None:
        raise DataError(
            f"calibration.data: {data}, but the model has no tokenizer to read text with. "
            "Add its tokenizer files to the folder, or use `data: self`."
        )
    local = Path(data).expanduser()
    source = local.name if local.is_file() else data
    length, wanted = spec.sequence_length, _wanted(spec)
    inner = length - (leading_token(tokenizer) is not None)
    pool = wanted * inner * _POOL
    # Not the seed alone, which draws the windows' order.
    order = random.Random(f"stretch {spec.seed}")
    reader, encoder = RowReader(), Encoder(tokenizer)
    documents = read_texts(data, seed=spec.seed, reader=reader)
    batches = iter(lambda: list(itertools.islice(documents, _BATCH)), [])
    texts = (
        [_stretch(encoder.text(one), pool * _CHARACTERS_PER_TOKEN, order) for one in batch]
        for batch in batches
    )
    stream = _tokenise(texts, pool, tokenizer, progress)
    notes = [*reader.notes(source), *encoder.notes(source)]
    check_left_out(source, reader.left_out, reader.rows, notes)
    if len(stream) < 2 * inner:
        raise DataError(
            f"{data}: {len(stream)} tokens; two windows of {length} need {2 * inner}. "
            "Give more text, or a smaller calibration.sequence_length."
        )
    ids_NL = _cut(stream, length, tokenizer, model, source)
    return _split(source, ids_NL, wanted, spec.seed, notes)


def _own_windows(
    spec: Calibration, tokenizer: Any, model: Any, progress: Progress | None
) -> list[Windows]:
    """Return the windows of what the dense model writes: conversations, if any, and free text.

    Raises:
        DataError: as `calibration_windows`.
    """
    if model is None:
        raise DataError(
            "calibration.data: self, which is sampled from the dense model; there is none "
            "here. Name a file or a data set."
        )
    length, wanted = spec.sequence_length, _wanted(spec)
    parts: list[Windows] = []
    notes: list[str] = []
    half = wanted // 2
    # Each part needs a window to fit to and one to hold out.
    if half >= 2 and getattr(tokenizer, "chat_template", None):
        ids_NL = _conversations(half, spec, tokenizer, model, notes, progress)
        if len(ids_NL) < 2:
            notes.append(
                f"{OWN_TEXT}: free text alone, since the model writes no conversations, or too "
                "few, in its chat template."
            )
        else:
            parts.append(_split(OWN_TEXT, ids_NL, half, spec.seed, notes))
            notes, wanted = [], wanted - half
    ids_NL = sampled_windows(model, tokenizer, wanted, length, spec.seed, progress=progress)
    return [*parts, _split(OWN_TEXT, ids_NL, wanted, spec.seed, notes)]


def _conversations(
    wanted: int,
    spec: Calibration,
    tokenizer: Any,
    model: Any,
    notes: list[str],
    progress: Progress | None,
) -> Tensor:
    """Return windows of conversations that the dense model writes: as many as wanted, or fewer."""
    encoder = Encoder(tokenizer)
    pool = wanted * (spec.sequence_length - (leading_token(tokenizer) is not None))
    at_once = rows_for(pool, model.device)

    def texts() -> Iterator[list[str]]:
        if not can_converse(model, tokenizer):
            return
        given = 0
        # A template may write fewer tokens than were sampled: it may leave thoughts out.
        for share in _SAMPLED:
            tokens = math.ceil(share * pool)
            _, found = sampled_conversations(
                model, tokenizer, tokens, spec.seed, at_once=at_once, progress=progress
            )
            if len(found) == given:
                return
            yield [encoder.text(conversation) for conversation in found[given:]]
            given = len(found)

    stream = _tokenise(texts(), pool, tokenizer, progress)
    notes += encoder.notes(OWN_TEXT)
    return _cut(stream, spec.sequence_length, tokenizer, model, OWN_TEXT)


def _wanted(spec: Calibration) -> int:
    """Return how many windows a text is to give."""
    return max(2, math.ceil(spec.tokens / spec.sequence_length))


def _split(source: str, ids_NL: Tensor, wanted: int, seed: int, notes: list[str]) -> Windows:
    """Draw the wanted windows, and some of them to hold out."""
    found, length = ids_NL.shape
    if found < wanted:
        notes.append(
            f"{source}: only {found * length} tokens ({found} windows of {length}); "
            f"{wanted * length} were wanted."
        )
    wanted = min(wanted, found)
    aside = min(max(round(wanted / 16), 1), 16)
    draw = random.Random(seed)
    start = draw.randrange(found - aside + 1)
    # One stretch of the text: windows between those of the fit would be of the same articles, and
    # would not measure the fit on others.
    held_out = ids_NL[start : start + aside].clone()
    rest = [n for n in range(found) if not start <= n < start + aside]
    draw.shuffle(rest)
    return Windows(ids_NL[rest[: wanted - aside]], source, held_out, tuple(notes))


def _tokenise(
    batches: Iterable[list[str]], pool: int, tokenizer: Any, progress: Progress | None
) -> list[int]:
    """Tokenise batches of texts until there are enough tokens, and join them.

    Returns:
        At most `pool` tokens, without those that begin a text.
    """
    first = leading_token(tokenizer)
    stream: list[int] = []
    for texts in batches:
        encoded = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)
        for ids in encoded["input_ids"]:
            begins = first is not None and ids[:1] == [first]
            _append(stream, ids[1:] if begins else ids, tokenizer.eos_token_id)
        if progress is not None:
            progress(min(len(stream), pool), pool, "tokenising")
        if len(stream) >= pool:
            break
    return stream[:pool]


def _cut(stream: list[int], length: int, tokenizer: Any, model: Any, source: str) -> Tensor:
    """Cut tokens into windows, each of which begins as the tokenizer begins a text.

    Raises:
        DataError: if the model has no embedding for a token.
    """
    first = leading_token(tokenizer)
    inner = length - (first is not None)
    count = len(stream) // inner
    ids_NL = torch.tensor(stream[: count * inner], dtype=torch.int64).view(count, inner)
    if first is not None:
        ids_NL = torch.cat([torch.full((count, 1), first), ids_NL], dim=1)
    if model is not None:
        rows = embedding_rows(model)
        check_ids(ids_NL.flatten().numpy(), tokenizer, rows, f"calibration.data: {source}")
    return ids_NL


def _stretch(text: str, characters: int, order: random.Random) -> str:
    """Return a random stretch of a text that is longer than needed."""
    if len(text) <= characters:
        return text
    start = order.randrange(len(text) - characters + 1)
    return text[start : start + characters]


def _append(stream: list[int], ids: list[int], eos: int | None) -> None:
    """Add a document's tokens, with the end token before them unless the stream ends in it."""
    # A chat template's last turn ends in the same token, and perhaps a line end.
    if stream and ids and eos is not None and eos not in stream[-2:]:
        stream.append(eos)
    stream.extend(ids)
