"""Convert a model piece by piece: no more of it is in memory than a decoder layer at a time.

A piece is read, rewritten by the same functions that rewrite a whole model, and handed to a thread
that writes it to its places in the files; meanwhile the next one is read. A third thread takes the
digests of the model's files for the manifest. When all pieces are on the disk, every tensor is
read back and held against what was handed over, the headers against the model that the new config
describes, and only then is the folder renamed.

What it costs: beside the piece at hand, the one that is being written stays in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

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
    write_companions,
    write_manifest,
)
from llmslim.errors import CheckpointError
from llmslim.recipe import recipe_yaml
from llmslim.reporting.card import model_card
from llmslim.surgery import Plan, Report

from .job import Conversion, Job
from .journal import Done, Journal, key_of
from .outcome import Outcome, is_dropped
from .work import Work


def convert_streamed(job: Job, pieces: Pieces, work: Work) -> Conversion:
    """Read, rewrite and write piece by piece; read back; rename.

    Args:
        job: what to do.
        pieces: the model.
        work: the folder for it.

    Raises:
        CheckpointError: if there is too little space, or what was written is not what was made.
    """
    plan = surgery.plan(pieces.model, job.recipe, model_name=job.source.name, init=job.init)
    outcome = Outcome(pieces, plan, job.max_shard_size)
    key = key_of(job)
    _check_space(job, outcome, work)
    with (
        _one_core_left(),
        work.begun(key, resume=job.resume) as journal,
        FileHashes() as hashes,
    ):
        conversion = _Streamed(job, pieces, plan, outcome, work.checkpoint, journal, hashes)
        conversion.write_weights()
        report = conversion.finish()
        work.publish(journal)
    steps = len(plan.sites)
    job.tell(steps + 1, steps + 1, "done")
    return Conversion(job.target, report)


class _Streamed:
    def __init__(
        self,
        job: Job,
        pieces: Pieces,
        plan: Plan,
        outcome: Outcome,
        folder: Path,
        journal: Journal,
        hashes: FileHashes,
    ) -> None:
        self.job, self.pieces, self.plan, self.outcome = job, pieces, plan, outcome
        self.folder, self.journal, self.hashes = folder, journal, hashes
        self.tokenizer = load_tokenizer(job.source)
        self.steps, self.total = 0, len(plan.sites)

    def write_weights(self) -> None:
        """Bring every piece that is not done yet to the disk."""
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
            for piece in self.pieces.all:
                for path in self.pieces.files(piece):
                    self.hashes.start(path)
                sites = [site for site in self.plan.sites if self._is_in(site.name, piece)]
                if piece.name in done:
                    self.steps += len(sites)
                    continue
                self.pieces.load(piece)
                nonfinite = nonfinite_tensors(self.pieces.tensors(piece))
                if nonfinite and not self.job.allow_nonfinite:
                    self._refuse_nonfinite(piece, nonfinite)
                errors = self._rewrite(piece, nonfinite)
                about[piece.name] = Done(piece.name, {}, errors, nonfinite)
                files.put(piece.name, self._tensors(piece))
                self.pieces.release(piece)
            files.wait()

    def finish(self) -> Report:
        """Write what belongs beside the weights, read everything back, and return the report.

        Raises:
            CheckpointError: if a tensor was not made, or something reads back differently.
        """
        job, outcome, folder = self.job, self.outcome, self.folder
        job.tell(self.total, self.total + 1, "writing and reading back")
        report = self._report()
        digests = {n: d for done in self.journal.done.values() for n, d in done.digests.items()}
        known = read_back(folder, outcome.layout, digests)
        self._write_config()
        recipe_text = recipe_yaml(job.recipe)
        card = model_card(
            report,
            recipe_text=recipe_text,
            base_model=job.source.given,
            slim=outcome.is_slim,
        )
        write_companions(
            folder,
            tokenizer=self.tokenizer,
            report=report.to_dict(),
            recipe_text=recipe_text,
            model_card=card,
        )
        known |= {path: self.hashes.of(path) for path in input_files(job.source)}
        write_manifest(folder, source=job.source, known=known)
        flush_all(folder)
        check_loads(folder, outcome.tensors, type(outcome.model).__name__)
        if self.tokenizer is not None:
            check_tokenizer(self.tokenizer, folder)
        return report

    def _refuse_nonfinite(self, piece: Piece, found: list[str]) -> None:
        """Look through what is left of the model, and name all weights that are not finite.

        Raises:
            CheckpointError: always.
        """
        self.pieces.release(piece)
        for later in self.pieces.all[self.pieces.all.index(piece) + 1 :]:
            self.pieces.load(later)
            found = found + nonfinite_tensors(self.pieces.tensors(later))
            self.pieces.release(later)
        told_of_nonfinite(found, self.job.source.given)

    @torch.no_grad()
    def _rewrite(self, piece: Piece, nonfinite: list[str]) -> dict[str, float | None]:
        """Do what the plan says about one piece; return the errors of its blocks."""
        model = self.pieces.model
        errors: dict[str, float | None] = {}
        if is_dropped(piece.name, self.plan):
            return errors
        told = told_of_nonfinite(nonfinite, self.job.source.given, allow_nonfinite=True)
        with blamed_on(told):
            for mlp in self.plan.mlps:
                if self._is_in(mlp.mlp.down, piece):
                    surgery.resize_mlp(model, mlp.mlp, mlp.width)
            for site in self.plan.sites:
                if self._is_in(site.name, piece):
                    errors[site.name] = surgery.fill_site(model, site, self.job.seed)
                    self.steps += 1
                    self.job.tell(self.steps, self.total + 1, site.name)
        return errors

    def _is_in(self, name: str, piece: Piece) -> bool:
        return self.pieces.piece_of(name) is piece

    def _tensors(self, piece: Piece) -> dict[str, torch.Tensor]:
        """Return what is stored of a piece, under the names that files have."""
        if is_dropped(piece.name, self.plan):
            return {}
        made = {self.plan.new_name(name): tensor for name, tensor in self.pieces.tensors(piece)}
        return self.outcome.as_stored(made)

    def _report(self) -> Report:
        done = [self.journal.done[piece.name] for piece in self.pieces.all]
        errors = {name: error for each in done for name, error in each.errors.items()}
        found = [name for each in done for name in each.nonfinite]
        notes = told_of_nonfinite(found, self.job.source.given, allow_nonfinite=True)
        return surgery.filled_in(self.plan, errors, (*self.plan.notes, *notes))

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


def _check_space(job: Job, outcome: Outcome, work: Work) -> None:
    """Refuse to begin what the disk has no space for.

    Raises:
        CheckpointError: if less is free than the weights take.
    """
    parent = next(folder for folder in work.path.parents if folder.exists())
    needed, there = sum(outcome.layout.sizes.values()), 0
    if job.resume and work.checkpoint.is_dir():
        files = [work.checkpoint / name for name in outcome.layout.sizes]
        # What is not written yet takes no blocks.
        there = sum(512 * getattr(f.stat(), "st_blocks", 0) for f in files if f.is_file())
    free = shutil.disk_usage(parent).free
    if needed - there > free:
        raise CheckpointError(
            f"{job.target}: no space left for it; its weights take {needed:,} bytes and {free:,} "
            "are free. Free some space or choose another disk."
        )
