"""Rows to heal a model with: the data of a recipe, tokenised, split, mixed and packed.

    sources ──► documents ──► ids on disk ──► split, weights, order ──► packed rows

Text is never held in memory as a whole: it goes from its source into a file of ids (tokens.py),
and rows are made from that file when they are needed (packing.py). In memory are a few numbers for
each document. Where a number of tokens is wanted, documents are first measured in characters, and
only those that the order reaches are tokenised.

Split: a permutation of a source's documents drawn from the seed, as `datasets` draws it; the first
ones are held out. With LaMini this is the split of the kphi-3 report. Of the others, those that
equal one that is held out, except in white space, are not trained on.
Weights: how often a pass sees each document of a source; 2.5 is twice, and a random half of them
once more. Where a number of tokens is wanted, sources without an end (what the model samples, and
streams) give their weight's share of it, and the others the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmslim.errors import DataError
from llmslim.progress import Progress
from llmslim.recipe.schema import Heal, HealSource

from .columns import check_left_out
from .conversations import rows_for, sampled_conversations
from .messages import characters, identity
from .packing import Ints, Rows, cut
from .prompts import Encoder, report_notes
from .sources import Source, open_source
from .tokens import Tokens, tokenise
from .vocabulary import check_ids, embedding_rows, stop_tokens

_SELF_TOKENS = 2**18
_CHARACTERS_PER_TOKEN = 8  # more than text has: it gives a lower bound of the tokens
_HELD_OUT_SHARE = 20  # one document in 20 is held out if the recipe does not set a number
_MOST_HELD_OUT = 1000


@dataclass(frozen=True)
class HealingText:
    """Packed rows to train on, others to measure by, and where they are from."""

    train: Rows
    """One pass over the data, or the tokens wanted where that is less."""
    held_out: Rows
    """Rows of documents that are not in `train`; none if none are to be held out."""
    source: str
    """Where the text is from."""
    licence: str
    """Of the text, source by source."""
    notes: tuple[str, ...]
    """Sentences about what was left out or changed."""
    padding: float
    """Share of padding in `train`."""


def _none() -> Ints:
    return np.zeros(0, dtype=np.int64)


@dataclass
class Part:
    """One source of D documents, on its way into rows."""

    source: Source
    weight: float
    sizes: Ints
    """Of each document, (D,): tokens, or a lower bound of them from its characters."""
    identities: Ints = field(default_factory=_none)
    """Equal for equal documents, 0 for an empty one, (D,)."""
    tokens: Tokens | None = None
    """None until it is known which documents to tokenise."""
    held_out: Ints = field(default_factory=_none)
    """The numbers of these documents, counted through all sources."""
    train: Ints = field(default_factory=_none)
    """The numbers of these documents, counted through all sources."""


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
    """Return the rows of a recipe's `heal` section.

    Args:
        spec: which data, how it becomes text, how much, and the seed.
        tokenizer: the model's.
        teacher: the dense model, which `self` samples from.
        context_length: tokens of one row.
        evenly: whether the rows are for `collate_apart`, which a model needs that would let samples
            in one row see each other.
        model: the model to heal: text with tokens that it has no embedding for is refused, and
            its generation config names the tokens that end an answer.
        cache: folder for ids and sampled text, so that a second run, a resumed one or another
            process need not make them again; in the user's cache if not given.
        progress: called with the amount done, the amount in all (as far as known), and the name of
            the work.

    Returns:
        Rows to train on and rows held out.

    Raises:
        DataError: if the data cannot be read, has other columns, less than half of its rows or
            nothing is left of it, or it has tokens that the model does not know.
    """
    _check_request(tokenizer, context_length)
    vocabulary = None if model is None else embedding_rows(model)
    encoder = Encoder(tokenizer, spec.template, spec.loss_on, stop_tokens(model))
    opener = _Opener(spec, encoder, teacher, cache, progress)
    parts = opener.open_all()
    seen = [(_first(documents, n, parts), n) for documents, n in passes(parts, spec)]
    held = np.concatenate([part.held_out for part in parts])
    tokens = opener.tokenise_wanted(parts, [held, *(documents for documents, _ in seen)])
    for part, one in zip(parts, tokens, strict=True):
        check_ids(one.ids, tokenizer, vocabulary, f"heal.data: {part.source.name}")
    joined = np.concatenate([_first(documents, n, parts) for documents, n in seen])
    order = np.random.default_rng([spec.seed, 2]).permutation(len(joined))

    def rows(documents: Ints) -> Rows:
        pad, pieces = _pad_token(tokenizer, vocabulary), cut(tokens, documents, context_length)
        return Rows(tokens, pieces, context_length, pad, spec.seed, evenly=evenly)

    train, held_out = rows(joined[order]), rows(held)
    names = ", ".join(part.source.name for part in parts)
    if not len(train):
        raise DataError(f"heal.data: {names}: nothing to learn from. Give other data.")
    notes = [*opener.notes, *_notes_on(parts, tokens, context_length)]
    if spec.template == "report":
        notes += report_notes(tokenizer)
    licences = _licences(parts, tokens)
    return HealingText(train, held_out, names, licences, tuple(notes), train.padding)


def _check_request(tokenizer: Any, context_length: int) -> None:
    """Refuse what no data could be read with.

    Raises:
        DataError: if there is no tokenizer, or a row has no room for a prediction.
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


def _notes_on(
    parts: Sequence[Part], tokens: Sequence[Tokens], context_length: int
) -> Iterator[str]:
    """Yield sentences about what was left out of each source, or changed."""
    for part, one in zip(parts, tokens, strict=True):
        yield from one.notes
        if longer := int((one.lengths > context_length).sum()):
            yield (
                f"{part.source.name}: {longer} documents are longer than the context of "
                f"{context_length} tokens and were cut into pieces."
            )


def _licences(parts: Sequence[Part], tokens: Sequence[Tokens]) -> str:
    """Return the licences of all sources, those that rows name where they do."""
    return ", ".join(
        f"{part.source.name}: {'; '.join(one.licences) or part.source.licence}"
        for part, one in zip(parts, tokens, strict=True)
    )


def _pad_token(tokenizer: Any, vocabulary: int | None) -> int:
    """Return a token to fill rows up with; it is never learned, but the model must know it."""
    given = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    known = (one for one in given if one is not None and (vocabulary is None or one < vocabulary))
    return next(known, 0)


def _with_held_out(tokens: int) -> int:
    """Return how many tokens to read so that this many are left when a share is held out."""
    return tokens + tokens // (_HELD_OUT_SHARE - 1) + 1


@dataclass
class _Opener:
    """Opens the sources of a recipe, and tokenises what is needed of them."""

    spec: Heal
    encoder: Encoder
    teacher: Any
    cache: Path | None
    progress: Progress | None
    notes: list[str] = field(default_factory=list)

    def open_all(self) -> list[Part]:
        """Open the sources, tokenised or, where not all will be needed, measured; hold some out."""
        data = self.spec.data
        listed = [
            HealSource(data=one) if isinstance(one, str) else one
            for one in (data if isinstance(data, tuple | list) else [data])
        ]
        weights = sum(one.weight for one in listed)
        parts = [self._open(one, one.weight / weights) for one in listed]
        split(parts, self.spec)
        self.notes += drop_copies(parts)
        return parts

    def tokenise_wanted(self, parts: list[Part], documents: list[Ints]) -> list[Tokens]:
        """Return each part's tokens: of measured ones, of the documents that are wanted.

        Args:
            parts: the sources; `tokens` and `sizes` of those that were measured are changed.
            documents: those that are wanted.

        Raises:
            DataError: if a source cannot be read, or less than half of what is wanted is left.
        """
        of_all = np.zeros(sum(len(part.sizes) for part in parts), dtype=bool)
        of_all[np.concatenate(documents)] = True
        ends = np.cumsum([len(part.sizes) for part in parts])
        for part, wanted in zip(parts, np.split(of_all, ends[:-1]), strict=True):
            if part.tokens is None:
                part.tokens = self._tokenise(part.source, wanted=wanted)
                part.sizes = part.tokens.lengths
                _check_left_out(part, part.sizes[wanted], part.tokens.notes)
        return [part.tokens for part in parts if part.tokens is not None]

    def _open(self, spec: HealSource, share: float) -> Part:
        """Open a source.

        Args:
            spec: the source in the recipe.
            share: its share of the tokens wanted, if it has no end.

        Raises:
            DataError: if it cannot be read, or there is nothing in it.
        """
        wanted = None if self.spec.tokens is None else math.ceil(self.spec.tokens * share)
        if spec.data == "self":
            source = self._sampled(spec, wanted)
        else:
            source = open_source(spec, seed=self.spec.seed, in_part=wanted is not None)
        if wanted is None or source.endless:
            limit = _with_held_out(wanted) if wanted is not None and source.stream else None
            tokens = self._tokenise(source, limit=limit)
            part = Part(source, spec.weight, tokens.lengths, tokens.identities, tokens)
            notes = list(tokens.notes)
        else:
            part = Part(source, spec.weight, *self._measure(source))
            notes = source.notes()
        if not part.sizes.any():
            rows = len(part.sizes)
            what = f"{rows} rows, none with text in it" if rows else "no rows"
            reason = f"no text is left. {' '.join(notes)}"
            raise DataError(
                f"{source.name}: "
                + (reason if notes else f"{what}; text to train on is needed.")
                + " Give other data."
            )
        _check_left_out(part, part.sizes, notes)
        return part

    def _tokenise(self, source: Source, **which: Any) -> Tokens:
        return tokenise(source, self.encoder, cache=self.cache, progress=self.progress, **which)

    def _sampled(self, spec: HealSource, wanted: int | None) -> Source:
        """Return conversations sampled from the dense model as a source.

        Raises:
            DataError: if there is no dense model, or all it writes is empty.
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
        tokens = _with_held_out(wanted or _SELF_TOKENS)
        key, conversations = sampled_conversations(
            self.teacher,
            self.encoder.tokenizer,
            tokens,
            self.spec.seed,
            cache=self.cache,
            at_once=rows_for(tokens, self.teacher.device),
            progress=self.progress,
        )
        if not conversations:
            raise DataError(
                "heal.data: self, but the model ends every conversation at once. "
                "Name a file or a data set."
            )
        return Source(
            name="self",
            licence="the model's own, since the model wrote it",
            key=f"self {key}",
            items=lambda: ((conversation, None) for conversation in conversations),
            rows=len(conversations),
            sampled=True,
            filtered=spec.filter == "refusals",
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


def _check_left_out(part: Part, sizes: Ints, notes: Sequence[str]) -> None:
    check_left_out(part.source.name, int((sizes == 0).sum()), len(sizes), notes)


def split(parts: list[Part], spec: Heal) -> None:
    """Draw which documents of each source are held out; fills in `held_out` and `train`.

    Args:
        parts: the sources.
        spec: how many to hold out, and the seed.

    Raises:
        DataError: if that would be all of a source.
    """
    rows = sum(len(part.sizes) for part in parts)
    first = 0
    for part in parts:
        count = len(part.sizes)
        if spec.held_out is not None:
            aside = round(spec.held_out * count / rows)
        elif part.source.held_out is not None:
            aside = part.source.held_out
        else:
            aside = min(_MOST_HELD_OUT, max(1, count // _HELD_OUT_SHARE), count - 1)
        if aside >= count:
            raise DataError(
                f"heal.held_out: {spec.held_out or aside}; {part.source.name} has {count} rows, "
                "of which some must be left to train on. Write a smaller number."
            )
        order = np.random.default_rng(spec.seed).permutation(count) + first
        part.held_out, part.train = order[:aside], order[aside:]
        first += count


def drop_copies(parts: list[Part]) -> list[str]:
    """Take documents out of `train` that are also held out, in any of the sources.

    Args:
        parts: the sources, split; `train` is changed.

    Returns:
        Sentences about it.
    """
    identities = np.concatenate([part.identities for part in parts])
    held = identities[np.concatenate([part.held_out for part in parts])]
    both = [(part, np.isin(identities[part.train], held[held != 0])) for part in parts]
    if not any(copies.any() for _, copies in both):
        return []
    sizes = np.concatenate([part.sizes for part in parts])
    if not any(sizes[part.train][~copies].any() for part, copies in both):
        names = ", ".join(part.source.name for part in parts)
        return [
            f"{names}: every row equals one that is held out; they are trained on nevertheless, so "
            "the held-out loss is no measure of other text."
        ]
    for part, copies in both:
        part.train = part.train[~copies]
    return [
        f"{part.source.name}: {int(copies.sum())} rows equal rows that are held out, and are not "
        "trained on."
        for part, copies in both
        if copies.any()
    ]


def passes(parts: list[Part], spec: Heal) -> list[tuple[Ints, int | None]]:
    """Return the documents to train on, each pass in random order.

    Args:
        parts: the sources, split.
        spec: how many tokens, and the seed.

    Returns:
        One pass over all sources that have an end; and, where `tokens` are wanted, one over each
        that has none: the documents, and how many tokens are wanted of them, None for all.
    """
    draw = np.random.default_rng([spec.seed, 0])
    weights = sum(part.weight for part in parts)
    found: list[tuple[Ints, int | None]] = []
    together: list[Ints] = []
    left = spec.tokens
    for part in parts:
        if spec.tokens is not None and left is not None and part.source.endless:
            share = round(spec.tokens * part.weight / weights)
            left -= share
            found.append((draw.permutation(part.train), share))
        else:
            copies, rest = divmod(part.weight, 1)
            more = draw.permutation(part.train)[: round(rest * len(part.train))]
            together += [*[part.train] * int(copies), more]
    if together:
        found.append((draw.permutation(np.concatenate(together)), left))
    return found


def _first(documents: Ints, tokens: int | None, parts: list[Part]) -> Ints:
    """Return the first documents that have the tokens, by the sizes known; None wants all."""
    if tokens is None:
        return documents
    sizes = np.concatenate([part.sizes for part in parts])[documents]
    return documents[: int(np.searchsorted(sizes.cumsum(), tokens)) + 1]
