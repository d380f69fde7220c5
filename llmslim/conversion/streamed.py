"""Convert a model piece by piece: no more of it is in memory than a decoder layer at a time.

A piece is read, rewritten by the same functions that rewrite a whole model, and handed to a thread
that writes its files; meanwhile the next one is read. A third thread takes the
digests of the model's files for the manifest. When all pieces are on the disk, every file is read
back and compared with what was handed over, the headers with the model that the new config
describes, each piece is run and compared with what it computed as it was made, and only then is the
folder renamed.

What it costs: two pieces are in memory, the one that is made and the one that is written; and files
of weights follow the layers.

Where blocks are fitted to calibration text, decoder layers come first, see `layer_store`. What
takes the model as a whole has a step of its own: text of its own and measuring a budget before
that, see `whole_model`, training end to end after it. All results are kept for `resume`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmslim import editing, fitting, planning
from llmslim.anatomy.sites import find_layers
from llmslim.data import Windows
from llmslim.editing.plans import Plan
from llmslim.fitting.layer_store import Fitted
from llmslim.modeling.base_class import auto_class_name
from llmslim.report.report import Report
from llmslim.storage import (
    INDEX,
    Piece,
    Pieces,
    check_loads,
    check_tokenizer,
    explain_nonfinite,
    flush_all,
    hashing,
    input_files,
    load_model,
    load_tokenizer,
    nonfinite_notes,
    nonfinite_tensors,
    open_source,
    parse_size,
    quiet,
    type_notes,
    write_checkpoint,
    write_companions,
    write_manifest,
    write_whole,
)

from .calibrate import read_text
from .conversion_dir import ConversionDir, key_of
from .finished import FinishedPieces, PieceRecord
from .layer_store import LayersOnDisk
from .proof import PieceRunner, check_computes
from .request import Conversion, Request
from .target_model import TargetModel, is_dropped
from .whole_model import WholeModel, share_out


def convert_streamed(
    request: Request, pieces: Pieces, work: ConversionDir, notes: tuple[str, ...] = ()
) -> Conversion:
    """Read, rewrite and write piece by piece; read back; rename.

    Args:
        request: what to do.
        pieces: the model.
        work: the folder for it.
        notes: sentences for the report.

    Raises:
        CheckpointError: if there is too little space, or what was written is not what was made.
    """
    source, options = request.source, request.options
    plan = planning.plan(pieces.model, request.recipe, model_name=source.name, init=options.init)
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    with ExitStack() as stack:
        with WholeModel(request) as whole:
            text = None
            if plan.needs_calibration:
                text = read_text(request, tokenizer, pieces.model, whole)
            key = key_of(request, text)
            stack.enter_context(work.begun(key, resume=options.resume))
            if text is not None and plan.recipe.has_auto:
                recipe = share_out(request, plan, text, work, whole)
                plan = planning.plan(
                    pieces.model, recipe, model_name=source.name, init=options.init
                )
        plan, recompute = fitting.fit_for_training(plan, request.device, loaded=False)
        target = TargetModel(pieces, plan, parse_size(options.max_shard_size))
        trains = text is not None and fitting.steps_of(plan) > 0
        _check_space(work, target, text, trains=trains, resume=options.resume)
        if text is None:
            stack.enter_context(_one_core_left())
        hash_of = stack.enter_context(hashing())
        conversion = _Streamed(request, pieces, plan, target, work, hash_of)
        states = conversion.write_weights(text)
        written = (*type_notes(source, pieces.model.dtype, options.dtype), *notes)
        if states is None:
            report = conversion.finish(tokenizer, text, written)
            work.publish(key, work.checkpoint)
        else:
            report = conversion.train(tokenizer, text, states, written, recompute=recompute)
            work.publish(key, work.trained)
    request.progress(conversion.total + 1, conversion.total + 1, "done")
    return Conversion(request.target, report, auto_class_name(source.config))


def _check_space(
    work: ConversionDir, target: TargetModel, text: Windows | None, *, trains: bool, resume: bool
) -> None:
    """Refuse to begin what the disk has no space for; errors as of `ConversionDir.check_space`."""
    weights, streams = target.weight_bytes, 0
    if text is not None:
        fitted_to = text.ids.numel()
        tokens = fitted_to + fitting.random_token_count(fitted_to) + text.held_out.numel()
        # Both streams, in float32, after three layers at most.
        streams = 3 * 2 * 4 * tokens * target.model.config.get_text_config().hidden_size
    if trains:
        # The trained checkpoint, and four float32 copies of what is trained.
        weights += weights + 4 * 4 * target.model.num_parameters()
    work.check_space(weights, streams, resume=resume)


class _Streamed:
    def __init__(
        self,
        request: Request,
        pieces: Pieces,
        plan: Plan,
        target: TargetModel,
        work: ConversionDir,
        hash_of: Callable[[Path], Future[str]],
    ) -> None:
        self.request, self.pieces, self.plan, self.target = request, pieces, plan, target
        self.work, self.folder, self.hash_of = work, work.checkpoint, hash_of
        self.runner = PieceRunner(pieces)
        names = [piece.name for piece in pieces.all]
        self.finished = FinishedPieces(work.checkpoint, work.records, target, names)
        narrowed = [mlp.mlp.down for mlp in plan.mlps if mlp.fitted]
        self.planned = [*(site.name for site in plan.sites), *narrowed]
        self.steps, self.total = 0, len(self.planned) + fitting.steps_of(plan)
        self.seed_of = partial(editing.seed_of, seed=request.options.seed)

    def write_weights(self, text: Windows | None) -> fitting.DenseStates | None:
        """Write every piece that is not done yet, fitted to text where there is some.

        Returns:
            What a training end to end starts from, where there is one.
        """
        states = None
        with self.finished:
            if text is not None:
                states = self._fit(text)
                self.finished.wait()
            self._count_done()
            for piece in self.pieces.all:
                for path in self.pieces.files(piece):
                    self.hash_of(path)
                if piece.name in self.finished.done:
                    continue
                self.pieces.load(piece)
                nonfinite = nonfinite_tensors(self.pieces.tensors(piece))
                if nonfinite and not self.request.options.allow_nonfinite:
                    self.pieces.release(piece)
                    rest = self.pieces.all[self.pieces.all.index(piece) + 1 :]
                    self._nonfinite({piece.name: nonfinite, **self._look_through(rest)})
                errors = self._rewrite(piece, nonfinite)
                self._put(piece, PieceRecord(piece.name, errors, nonfinite))
                self.pieces.release(piece)
            self.finished.wait()
        return states if fitting.steps_of(self.plan) else None

    def train(
        self,
        tokenizer: Any,
        text: Windows | None,
        states: fitting.DenseStates,
        notes: Iterable[str],
        *,
        recompute: bool,
    ) -> Report:
        """Train the finished pieces together, and write the result; return the report."""
        refine, work, request = self.plan.recipe.refine, self.work, self.request
        assert text is not None
        assert refine is not None
        assert refine.end_to_end is not None
        self._write_config()
        model: Any = load_model(open_source(self.folder))
        model.generation_config = self.target.model.generation_config
        saved = work.snapshot()
        self._count_done()
        self.steps += 0 if saved is None else fitting.steps_done(saved)
        trained = fitting.train_end_to_end(
            model.to(request.device),
            self.plan,
            refine.end_to_end,
            states,
            seed=request.options.seed,
            recompute=recompute,
            saved=saved,
            save=work.keep_snapshot,
            progress=self._progress,
        )
        model.to("cpu")
        request.progress(self.total, self.total + 1, "writing and reading back")
        report = self._report(text, (trained.note, *text.notes, *notes))
        work.clear_trained()
        write_checkpoint(
            model,
            work.trained,
            **request.companions(model, tokenizer, report, self.plan.recipe),
            max_shard_size=parse_size(request.options.max_shard_size),
        )
        return report

    def finish(self, tokenizer: Any, text: Windows | None, notes: Iterable[str]) -> Report:
        """Write what belongs beside the weights, read everything back, and return the report."""
        source, target, folder = self.request.source, self.target, self.folder
        self.request.progress(self.total, self.total + 1, "writing and reading back")
        report = self._report(text, (*(() if text is None else text.notes), *notes))
        known = self.finished.hashes()
        self._write_config()
        recipe = self.plan.recipe
        write_companions(folder, **self.request.companions(target.model, tokenizer, report, recipe))
        known |= {path: self.hash_of(path).result() for path in input_files(source)}
        write_manifest(folder, source=source, known=known)
        flush_all(folder)
        kind = type(target.model).__name__
        written = check_loads(folder, target.tensors, kind, self.pieces.device)
        records = self.finished.done.values()
        fingerprints = {
            self.plan.new_name(one.piece): one.fingerprint for one in records if one.fingerprint
        }
        check_computes(written, target.model, fingerprints)
        check_tokenizer(tokenizer, folder)
        return report

    def _put(self, piece: Piece, record: PieceRecord) -> None:
        """Hand a finished piece to the thread that writes it."""
        tensors: dict[str, torch.Tensor] = {}
        if not is_dropped(piece.name, self.plan):
            record = replace(record, fingerprint=self.runner.fingerprint(piece))
            made = self.pieces.tensors(piece)
            tensors = {self.plan.new_name(name): tensor.cpu() for name, tensor in made}
        self.finished.put(record, tensors)

    def _fit(self, text: Windows) -> fitting.DenseStates | None:
        """Fit the decoder layers that are not done to text, in their order."""
        done, layers = self.finished.done, find_layers(self.pieces.model)
        inside = [name for name in self.planned if layers.index_of(name) is not None]
        trains = fitting.steps_of(self.plan) > 0
        if not trains and all(self.pieces.piece_of(name).name in done for name in inside):
            return None

        def finished(piece: Piece, fitted: Fitted, streams: str) -> None:
            about = (fitted.errors, nonfinite[piece.name], fitted.notes, fitted.unseen, streams)
            self._put(piece, PieceRecord(piece.name, *about))

        store = LayersOnDisk(self.pieces, self.plan, self.work.streams, done, finished)
        # A fit takes hours: what is wrong with the weights is found before it.
        nonfinite = self._look_through(p for p in self.pieces.all if p.name not in done)
        self._nonfinite(nonfinite)
        nonfinite |= {name: entry.nonfinite for name, entry in done.items()}
        self._count_done()
        with explain_nonfinite(self._nonfinite(nonfinite, allowed=True)):
            return fitting.fit_sequentially(
                self.pieces.model,
                self.plan,
                text.ids,
                text.held_out,
                seed_of=self.seed_of,
                progress=self._progress,
                store=store,
            ).states

    def _look_through(self, pieces: Iterable[Piece]) -> dict[str, list[str]]:
        """Return the tensors of each piece that hold NaN or infinities."""
        found = {}
        for piece in pieces:
            self.pieces.load(piece)
            found[piece.name] = nonfinite_tensors(self.pieces.tensors(piece))
            self.pieces.release(piece)
        return found

    def _nonfinite(
        self, found: Mapping[str, list[str]], *, allowed: bool = False
    ) -> tuple[str, ...]:
        """Return notes on the tensors of each piece that hold NaN or infinities, or refuse them."""
        names = [name for piece in self.pieces.all for name in found.get(piece.name, ())]
        allowed = allowed or self.request.options.allow_nonfinite
        return nonfinite_notes(names, self.request.source.given, allow_nonfinite=allowed)

    def _progress(self, what: str) -> None:
        self.steps += 1
        self.request.progress(self.steps, self.total + 1, what)

    def _count_done(self) -> None:
        done = self.finished.done
        self.steps = sum(self.pieces.piece_of(name).name in done for name in self.planned)

    @torch.no_grad()
    def _rewrite(self, piece: Piece, nonfinite: list[str]) -> dict[str, float | None]:
        """Carry out the plan for one piece; return the errors of its blocks."""
        model = self.pieces.model
        errors: dict[str, float | None] = {}
        if is_dropped(piece.name, self.plan):
            return errors
        with explain_nonfinite(self._nonfinite({piece.name: nonfinite})):
            for mlp in self.plan.mlps:
                if self._is_in(mlp.mlp.down, piece):
                    editing.resize_mlp(model, mlp.mlp, mlp.width)
            for site in self.plan.sites:
                if self._is_in(site.name, piece):
                    errors[site.name] = editing.fill_site(model, site, self.seed_of)
                    self._progress(site.name)
        return errors

    def _is_in(self, name: str, piece: Piece) -> bool:
        return self.pieces.piece_of(name) is piece

    def _report(self, text: Windows | None, notes: Iterable[str]) -> Report:
        fitted, nonfinite = Fitted(), {}
        for piece in self.pieces.all:
            done = self.finished.done[piece.name]
            fitted.add(Fitted(done.errors, notes=done.notes, unseen=done.unseen))
            nonfinite[piece.name] = done.nonfinite
        found = self._nonfinite(nonfinite, allowed=True)
        report = fitting.filled_in(
            self.plan, fitted.errors, (*self.plan.notes, *fitted.all_notes, *found, *notes)
        )
        fitted_to = "" if text is None else text.description
        return self.request.record(replace(report, fitted_to=fitted_to))

    def _write_config(self) -> None:
        """Let transformers write config, generation config and code; the weights are there."""
        beside = self.folder.with_name("config")
        shutil.rmtree(beside, ignore_errors=True)
        with quiet():
            self.target.model.save_pretrained(beside, state_dict={})
        for path in sorted(beside.iterdir()):
            if path.suffix != ".safetensors":
                path.replace(self.folder / path.name)
        shutil.rmtree(beside)
        if self.target.index is not None:
            write_whole(self.folder / INDEX, self.target.index)


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
