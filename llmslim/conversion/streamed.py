"""Convert a model piece by piece: no more of it is in memory than a decoder layer at a time.

A piece is read, rewritten by the same functions that rewrite a whole model, and handed to a thread
that writes it to its places in the files; meanwhile the next one is read. A third thread takes the
digests of the model's files for the manifest. When all pieces are on the disk, every tensor is
read back and held against what was handed over, the headers against the model that the new config
describes, each piece is run and compared with what it computed as it was made, and only then is the
folder renamed.

What it costs: beside the piece at hand, the one that is being written stays in memory.

Where blocks are fitted to calibration text, decoder layers come first, see `layered`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from llmslim import surgery
from llmslim.checkpoint import (
    INDEX,
    FileHashes,
    Piece,
    Pieces,
    TensorFiles,
    blamed_on,
    check_loads,
    check_tokenizer,
    flush_all,
    input_files,
    is_begun,
    load_tokenizer,
    nonfinite_tensors,
    quiet,
    read_back,
    told_of_nonfinite,
    told_of_types,
    write_companions,
    write_manifest,
)
from llmslim.data import Windows
from llmslim.modeling.base_class import auto_class_name
from llmslim.recipe import recipe_yaml
from llmslim.reporting.card import model_card
from llmslim.surgery import Fitted, Plan, Report
from llmslim.surgery.sites import find_layers

from .calibrate import read_text
from .options import Conversion, Job
from .journal import Done, Journal, key_of
from .layer_store import LayersOnDisk, most_bytes
from .target_model import Outcome, is_dropped
from .proof import Prover, check_computes
from .conversion_dir import Work


def convert_streamed(
    job: Job, pieces: Pieces, work: Work, notes: tuple[str, ...] = ()
) -> Conversion:
    """Read, rewrite and write piece by piece; read back; rename.

    Args:
        job: what to do.
        pieces: the model.
        work: the folder for it.
        notes: sentences for the report.

    Raises:
        CheckpointError: if there is too little space, or what was written is not what was made.
    """
    plan = surgery.plan(pieces.model, job.recipe, model_name=job.source.name, init=job.init)
    outcome = Outcome(pieces, plan, job.max_shard_size)
    tokenizer = load_tokenizer(job.source, trust_remote_code=job.trust_remote_code)
    text = read_text(job, tokenizer, pieces.model) if plan.needs_calibration else None
    key = key_of(job, text)
    sizes, streams = outcome.layout.sizes, 0
    if text is not None:
        hidden = outcome.model.config.get_text_config().hidden_size
        fitting = text.ids.numel()
        tokens = fitting + surgery.scrambled_tokens(fitting) + text.held_out.numel()
        streams = most_bytes(tokens, hidden)
    work.check_space(sizes, streams, resume=job.resume)
    with (
        _one_core_left() if text is None else nullcontext(),
        work.begun(key, resume=job.resume) as journal,
        FileHashes() as hashes,
    ):
        prover = Prover(pieces)
        conversion = _Streamed(job, pieces, plan, outcome, work, journal, hashes, prover)
        conversion.write_weights(text)
        written = told_of_types(job.source, pieces.model.dtype, job.dtype)
        report = conversion.finish(tokenizer, text, (*written, *notes))
        work.publish(journal)
    job.tell(conversion.total + 1, conversion.total + 1, "done")
    return Conversion(job.target, report, auto_class_name(job.source.config))


class _Streamed:
    def __init__(
        self,
        job: Job,
        pieces: Pieces,
        plan: Plan,
        outcome: Outcome,
        work: Work,
        journal: Journal,
        hashes: FileHashes,
        prover: Prover,
    ) -> None:
        self.job, self.pieces, self.plan, self.outcome = job, pieces, plan, outcome
        self.work, self.folder = work, work.checkpoint
        self.journal, self.hashes, self.prover = journal, hashes, prover
        narrowed = [mlp.mlp.down for mlp in plan.mlps if mlp.fitted]
        self.planned = [*(site.name for site in plan.sites), *narrowed]
        self.steps, self.total = 0, len(self.planned)
        self.seed_of = partial(surgery.seed_of, seed=job.seed)

    def write_weights(self, text: Windows | None) -> None:
        """Bring every piece that is not done yet to the disk.

        Args:
            text: what blocks in decoder layers are fitted to, if they are.
        """
        layout, done = self.outcome.layout, self.journal.done
        for path in self.folder.iterdir():  # of another run: only weights are of use
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.is_symlink() or path.name not in layout.sizes:
                path.unlink()
        if not all(is_begun(self.folder / name, layout) for name in layout.sizes):
            done.clear()  # whoever removed a file of them removed what was done
        about: dict[str, Done] = {}

        def written(piece: str, digests: dict[str, str]) -> None:
            self.journal.add(replace(about.pop(piece), digests=digests))

        with TensorFiles(self.folder, layout, written) as files:

            def put(piece: Piece, entry: Done) -> None:
                gone = is_dropped(piece.name, self.plan)
                sketch = [] if gone else self.prover.sketch(piece)
                about[piece.name] = replace(entry, sketch=sketch)
                files.put(piece.name, self._tensors(piece))

            if text is not None:
                self._fit(text, put)
                files.wait()
            self._count_done()
            for piece in self.pieces.all:
                for path in self.pieces.files(piece):
                    self.hashes.start(path)
                if piece.name in done:
                    continue
                self.pieces.load(piece)
                nonfinite = nonfinite_tensors(self.pieces.tensors(piece))
                if nonfinite and not self.job.allow_nonfinite:
                    self.pieces.release(piece)
                    rest = self.pieces.all[self.pieces.all.index(piece) + 1 :]
                    self._told({piece.name: nonfinite, **self._look_through(rest)})
                put(piece, Done(piece.name, {}, self._rewrite(piece, nonfinite), nonfinite))
                self.pieces.release(piece)
            files.wait()

    def finish(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text: Windows | None,
        notes: Iterable[str] = (),
    ) -> Report:
        """Write what belongs beside the weights, read everything back, and return the report.

        Args:
            tokenizer: the model's.
            text: what blocks in decoder layers were fitted to, if they were.
            notes: more sentences for the report.

        Raises:
            CheckpointError: if a tensor was not made, or something reads back differently.
        """
        job, outcome, folder = self.job, self.outcome, self.folder
        job.tell(self.total, self.total + 1, "writing and reading back")
        report = self._report((*(() if text is None else text.notes), *notes))
        if text is not None:
            report = replace(report, fitted_to=text.description)
        digests = {n: d for done in self.journal.done.values() for n, d in done.digests.items()}
        known = read_back(folder, outcome.layout, digests)
        self._write_config()
        recipe_text = recipe_yaml(job.recipe)
        card = model_card(
            report,
            recipe_text=recipe_text,
            base_model=job.source.given,
            slim=outcome.is_slim,
            auto_class=auto_class_name(outcome.model.config),
        )
        write_companions(
            folder,
            source=job.source,
            tokenizer=tokenizer,
            report=report.to_dict(),
            recipe_text=recipe_text,
            model_card=card,
        )
        known |= {path: self.hashes.of(path) for path in input_files(job.source)}
        write_manifest(folder, source=job.source, known=known)
        flush_all(folder)
        kind = type(outcome.model).__name__
        written = check_loads(folder, outcome.tensors, kind, self.pieces.device)
        done = self.journal.done.values()
        sketches = {self.plan.new_name(d.piece): d.sketch for d in done if d.sketch}
        check_computes(written, outcome.model, sketches)
        if tokenizer is not None:
            check_tokenizer(tokenizer, folder)
        return report

    def _fit(self, text: Windows, put: Callable[[Piece, Done], None]) -> None:
        """Fit the decoder layers that are not done, in their order.

        Args:
            text: what they are fitted to.
            put: takes up each.
        """
        done, layers = self.journal.done, find_layers(self.pieces.model)
        inside = [name for name in self.planned if layers.index_of(name) is not None]
        if all(self.pieces.piece_of(name).name in done for name in inside):
            return

        def finished(piece: Piece, fitted: Fitted, streams: str) -> None:
            about = (fitted.errors, nonfinite[piece.name], fitted.notes, fitted.unseen, streams)
            put(piece, Done(piece.name, {}, *about))

        visits = LayersOnDisk(self.pieces, self.plan, self.work.streams, done, finished)
        # A fit takes hours: what is wrong with the weights is found before it.
        nonfinite = self._look_through(p for p in self.pieces.all if p.name not in done)
        self._told(nonfinite)
        nonfinite |= {name: entry.nonfinite for name, entry in done.items()}
        self._count_done()
        with blamed_on(self._told(nonfinite, allowed=True)):
            surgery.fit_sequentially(
                self.pieces.model,
                self.plan,
                text.ids,
                text.held_out,
                seed_of=self.seed_of,
                progress=self._tell,
                visits=visits,
            )

    def _look_through(self, pieces: Iterable[Piece]) -> dict[str, list[str]]:
        """Return the tensors of each piece that hold NaN or infinities."""
        found = {}
        for piece in pieces:
            self.pieces.load(piece)
            found[piece.name] = nonfinite_tensors(self.pieces.tensors(piece))
            self.pieces.release(piece)
        return found

    def _told(self, found: Mapping[str, list[str]], *, allowed: bool = False) -> tuple[str, ...]:
        """Say which tensors hold NaN or infinities.

        Args:
            found: those of each piece.
            allowed: whether they were allowed already.

        Raises:
            CheckpointError: if there are any and they are not allowed.
        """
        names = [name for piece in self.pieces.all for name in found.get(piece.name, ())]
        allowed = allowed or self.job.allow_nonfinite
        return told_of_nonfinite(names, self.job.source.given, allow_nonfinite=allowed)

    def _tell(self, what: str) -> None:
        self.steps += 1
        self.job.tell(self.steps, self.total + 1, what)

    def _count_done(self) -> None:
        done = self.journal.done
        self.steps = sum(self.pieces.piece_of(name).name in done for name in self.planned)

    @torch.no_grad()
    def _rewrite(self, piece: Piece, nonfinite: list[str]) -> dict[str, float | None]:
        """Do what the plan says about one piece; return the errors of its blocks."""
        model = self.pieces.model
        errors: dict[str, float | None] = {}
        if is_dropped(piece.name, self.plan):
            return errors
        with blamed_on(self._told({piece.name: nonfinite})):
            for mlp in self.plan.mlps:
                if self._is_in(mlp.mlp.down, piece):
                    surgery.resize_mlp(model, mlp.mlp, mlp.width)
            for site in self.plan.sites:
                if self._is_in(site.name, piece):
                    errors[site.name] = surgery.fill_site(model, site, self.seed_of)
                    self._tell(site.name)
        return errors

    def _is_in(self, name: str, piece: Piece) -> bool:
        return self.pieces.piece_of(name) is piece

    def _tensors(self, piece: Piece) -> dict[str, torch.Tensor]:
        """Return what is stored of a piece, under the names that files have."""
        if is_dropped(piece.name, self.plan):
            return {}
        made = {self.plan.new_name(n): tensor.cpu() for n, tensor in self.pieces.tensors(piece)}
        return self.outcome.as_stored(made)

    def _report(self, notes: Iterable[str]) -> Report:
        fitted, nonfinite = Fitted(), {}
        for piece in self.pieces.all:
            done = self.journal.done[piece.name]
            fitted.add(Fitted(done.errors, notes=done.notes, unseen=done.unseen))
            nonfinite[piece.name] = done.nonfinite
        said = (*self.plan.notes, *fitted.told, *self._told(nonfinite, allowed=True), *notes)
        return surgery.filled_in(self.plan, fitted.errors, said)

    def _write_config(self) -> None:
        """Let transformers write config, generation config and code; the weights are there."""
        layout = self.outcome.layout
        beside = self.folder.with_name("config")
        shutil.rmtree(beside, ignore_errors=True)
        with quiet():
            self.outcome.model.save_pretrained(beside, state_dict={})
        for path in sorted(beside.iterdir()):
            if path.suffix != ".safetensors":
                path.replace(self.folder / path.name)
        shutil.rmtree(beside)
        if layout.index is not None:
            (self.folder / INDEX).write_text(layout.index, encoding="utf-8")


@contextmanager
def _one_core_left() -> Iterator[None]:
    """Leave a core to reading, writing and hashing.

    torch's threads wait for each other at every step: where one of them shares its core, all go at
    its pace. On two cores that made fits three times as slow.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
