"""Rows to heal a model with: the data a recipe names, tokenised, split and packed.

    sources ──► documents ──► ids on disk ──► split, weights, order ──► packed rows

Text is never held in memory as a whole: it goes from its source into a file of ids
(tokens.py), and rows are made from that file when they are asked for (packing.py). In memory are
a few numbers for each document.

Where only so many are wanted, documents are first measured in characters, and only those
that the order reaches are tokenised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmslim.errors import DataError
from llmslim.progress import Progress
from llmslim.recipe.schema import Heal, HealSource

from .columns import characters, check_left, identity
from .conversations import sampled_conversations
from .mixture import HELD_OUT_SHARE, Part, join, passes, split, without_copies
from .packing import Ints, Rows, cut
from .prompts import REPORT_TAGS, Encoder
from .sources import Item, Source, open_source
from .tokens import Tokens, tokenise
from .vocabulary import check_ids, embedding_rows, stop_tokens

_SELF_TOKENS = 2**18
_CHARACTERS_PER_TOKEN = 8  # more than text has: so many characters are tokens enough


@dataclass(frozen=True)
class HealingText:
    """Packed rows to train on, others to measure by, and what is to be said about them."""

    train: Rows
    """One pass over the data, or the tokens asked for where that is less."""
    held_out: Rows
    """Rows of documents that are not in `train`; none if none are to be held out."""
    source: str
    """Where the text is from."""
    licence: str
    """Under which it is given, source by source."""
    notes: tuple[str, ...]
    """Sentences about what turned out otherwise than asked for."""
    padding: float
    """Share of padding in `train`."""


@dataclass
class _Job:
    """What opening a source needs to know."""

    spec: Heal
    encoder: Encoder
    teacher: Any
    cache: Path | None
    progress: Progress | None
    notes: list[str] = field(default_factory=list)

    def open(self, asked: HealSource, share: float) -> Part:
        """Open a source; tokenise it, or measure it where only some of it will be needed.

        Args:
            asked: what the recipe says about it.
            share: its share of the tokens wanted, if it has no end.

        Raises:
            DataError: if it cannot be read, or there is nothing in it.
        """
        wanted = None if self.spec.tokens is None else math.ceil(self.spec.tokens * share)
        if asked.data == "self":
            source = self._from_the_model(asked, wanted)
        else:
            source = open_source(asked, seed=self.spec.seed, in_part=wanted is not None)
        tokens = None
        if wanted is None or source.endless:
            limit = _with_held_out(wanted) if wanted is not None and source.stream else None
            tokens = self.tokenise(source, limit=limit)
            sizes, identities = tokens.lengths, tokens.identities
        else:
            sizes, identities = self._measure(source)
        if not sizes.any():
            raise DataError(_nothing_in(source, len(sizes), tokens))
        left_out = int((sizes == 0).sum())
        check_left(source.name, left_out, len(sizes), tokens.notes if tokens else source.notes())
        none = np.zeros(0, dtype=np.int64)
        return Part(source, asked.weight, sizes, tokens, none, none, identities)

    def tokenise(self, source: Source, **which: Any) -> Tokens:
        """Return a source's documents as ids."""
        return tokenise(source, self.encoder, cache=self.cache, progress=self.progress, **which)

    def _from_the_model(self, asked: HealSource, wanted: int | None) -> Source:
        """Return conversations sampled from the dense model as a source.

        Raises:
            DataError: if there is no dense model, or it says nothing.
        """
        if self.teacher is None:
            raise DataError(
                "heal.data: self, which is sampled from the dense model; there is none here. "
                "Name it as `teacher`, or name a file or a data set."
            )
        if wanted is None:
            self.notes.append(
                f"self: {_SELF_TOKENS} tokens were sampled, since `tokens` is not given."
            )
        key, conversations = sampled_conversations(
            self.teacher,
            self.encoder.tokenizer,
            _with_held_out(wanted or _SELF_TOKENS),
            self.spec.seed,
            cache=self.cache,
            progress=self.progress,
        )
        items: list[Item] = [(conversation, None) for conversation in conversations]
        return Source(
            name="self",
            licence="the model's own, since the model wrote it",
            key=f"self {key}",
            items=lambda: iter(items),
            rows=len(items),
            sampled=True,
            filtered=asked.filter == "refusals",
        )

    def _measure(self, source: Source) -> tuple[Ints, Ints]:
        """Return a lower bound of each document's tokens, 0 for an empty one, and its identity."""
        sizes: list[int] = []
        identities: list[int] = []
        for document in source.documents():
            sizes.append(characters(document) // _CHARACTERS_PER_TOKEN + 1 if document else 0)
            identities.append(identity(document) if document else 0)
            if self.progress is not None and not len(sizes) % 1024:
                self.progress(len(sizes), max(len(sizes), source.rows or 0), "measuring")
        return np.array(sizes, dtype=np.int64), np.array(identities, dtype=np.int64)


def healing_text(
    spec: Heal,
    tokenizer: Any,
    *,
    teacher: Any = None,
    context_length: int,
    evenly: bool = False,
    model: Any = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> HealingText:
    """Return the rows that a recipe's `heal` section asks for.

    Args:
        spec: which data, how it becomes text, how much, and the seed.
        tokenizer: the model's.
        teacher: the dense model, which `self` samples from.
        context_length: tokens of one row.
        evenly: whether the rows are for `collate_apart`, which a model needs that would let samples
            in one row see each other.
        model: what is to be healed: text with tokens that it has no embedding for is refused, and
            its generation config says which tokens end an answer.
        cache: folder for ids and sampled text, so that a second run, a resumed one or another
            process need not make them again; in the user's cache if not given.
        progress: called with what is done, what there is in all (as far as known), and a word on
            what is being done.

    Returns:
        Rows to train on and rows held out.

    Raises:
        DataError: if the data cannot be read, has other columns, less than half of its rows or
            nothing is left of it, or it has tokens that the model does not know.
    """
    if tokenizer is None:
        raise DataError(
            "heal: the model has no tokenizer to read text with. Add its tokenizer files."
        )
    if context_length < 2:
        raise DataError(
            f"heal.context_length: {context_length}; a row needs 2 tokens or more. "
            "Something like 1024 is usual."
        )
    vocabulary = None if model is None else embedding_rows(model)
    encoder = Encoder(tokenizer, spec.template, spec.loss_on, stop_tokens(model))
    job = _Job(spec, encoder, teacher, cache, progress)
    asked = [_as_source(one) for one in _listed(spec.data)]
    weights = sum(one.weight for one in asked)
    parts = [job.open(one, one.weight / weights) for one in asked]
    notes = list(job.notes)
    split(parts, spec)
    notes += without_copies(parts)
    found = [one.cut(parts) for one in passes(parts, spec)]
    for index, part in enumerate(parts):
        if part.tokens is None:
            wanted = np.zeros(len(part.sizes), dtype=bool)
            for one in found:
                wanted[one.document[one.source == index]] = True
            wanted[part.held_out] = True
            part.tokens = job.tokenise(part.source, wanted=wanted)
            part.sizes = part.tokens.lengths
            left_out = int((part.sizes[wanted] == 0).sum())
            check_left(part.source.name, left_out, int(wanted.sum()), part.tokens.notes)
        check_ids(part.tokens.ids, tokenizer, vocabulary, f"heal.data: {part.source.name}")
    tokens = [part.tokens for part in parts if part.tokens is not None]
    seen = join([one.cut(parts) for one in found], spec.seed)
    aside = np.repeat(np.arange(len(parts)), [len(part.held_out) for part in parts])
    held = np.concatenate([part.held_out for part in parts])

    def packed(source: Ints, document: Ints) -> Rows:
        pieces = cut(tokens, source, document, context_length)
        pad = _pad_token(tokenizer, vocabulary)
        return Rows(tokens, pieces, context_length, pad, spec.seed, evenly=evenly)

    train, held_out = packed(seen.source, seen.document), packed(aside, held)
    if not len(train):
        raise DataError(f"heal.data: {_names(parts)}: nothing to learn from. Give other data.")
    for part, ids in zip(parts, tokens, strict=True):
        longer = int((ids.lengths > context_length).sum())
        notes += ids.notes
        if longer:
            notes.append(
                f"{part.source.name}: {longer} documents are longer than the context of "
                f"{context_length} tokens and were cut into pieces."
            )
    if spec.template == "report" and (spelt := _spelt_out(tokenizer)):
        notes.append(
            f"template report: the tokenizer has no token for {', '.join(spelt)}; each is "
            "several tokens."
        )
    return HealingText(
        train, held_out, _names(parts), _licences(parts), tuple(notes), train.padding
    )


def _pad_token(tokenizer: Any, vocabulary: int | None) -> int:
    """Return a token to fill rows up with; no loss falls on it, but the model must know it."""
    given = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    known = (one for one in given if one is not None and (vocabulary is None or one < vocabulary))
    return next(known, 0)


def _listed(data: Any) -> list[Any]:
    return list(data) if isinstance(data, tuple | list) else [data]


def _as_source(given: str | HealSource) -> HealSource:
    return HealSource(data=given) if isinstance(given, str) else given


def _with_held_out(tokens: int) -> int:
    """Return so many tokens more that a share can be held out."""
    return tokens + tokens // (HELD_OUT_SHARE - 1) + 1


def _nothing_in(source: Source, rows: int, tokens: Tokens | None) -> str:
    refused = " ".join(tokens.notes if tokens else source.notes())
    if refused:
        return f"{source.name}: no text is left. {refused} Give other data."
    what = f"{rows} rows, none with text in it" if rows else "no rows"
    return f"{source.name}: {what}; text to train on is needed. Give other data."


def _names(parts: list[Part]) -> str:
    return ", ".join(part.source.name for part in parts)


def _licences(parts: list[Part]) -> str:
    """Name each source's licence: what its rows say, if they say it."""
    said = []
    for part in parts:
        assert part.tokens is not None
        own = part.source.licence
        rows = part.tokens.licences
        said.append(f"{part.source.name}: {'; '.join(rows) if rows else own}")
    return ", ".join(said)


def _spelt_out(tokenizer: Any) -> list[str]:
    """Return the report's tags that are no tokens of their own."""
    return [
        tag for tag in REPORT_TAGS if len(tokenizer(tag, add_special_tokens=False)["input_ids"]) > 1
    ]
