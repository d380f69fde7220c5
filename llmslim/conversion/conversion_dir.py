"""The folder of a conversion that is not finished: what is needed to continue after a kill.

    .OUT.partial/
        lock          held by the process that works here
        run.json      what the result depends on
        recipe.yaml   with the sizes that a budget comes to
        checkpoint/   the files as they will be
        records/      what else is to be known of each finished piece
        streams/      hidden states between decoder layers, for fits to calibration text
        training/     the state of a training end to end
        trained/      the checkpoint after it, once that is whole
        config/       what transformers writes beside weights, for the moment of writing it
        old/          what OUT was, for the moment of replacing it

It stands beside the checkpoint that is to be written, and goes when that one is whole. An error
in the request leaves nothing; whatever may be better next time, an interrupt, a full disk or a
kill, leaves it for `resume`.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmslim.atomic import replacing, write_whole
from llmslim.data import Windows
from llmslim.errors import CheckpointError, SlimError, UnfinishedError
from llmslim.recipe import Recipe, recipe_yaml
from llmslim.report.read import read_report
from llmslim.report.report import Report
from llmslim.storage import (
    RunDir,
    disk_problem,
    input_files,
    publish,
    remove,
    resolved,
    versions,
)

from .request import Request

_STATE = "state.safetensors"
_HEAD = 1 << 20
_SAMPLES, _SAMPLE = 64, 1 << 16
_KNOWN = re.compile(
    r"(checkpoint|records|streams|training|trained|config|old|\.?recipe\.yaml(\.new)?)$"
    r"|\.trained\.partial-\w+$"
)


class ConversionDir(RunDir):
    """The working folder of a conversion.

    Args:
        target: the checkpoint that is to be written.
    """

    def __init__(self, target: Path) -> None:
        self.given = target
        self.target = resolved(target)  # a link to a folder stays a link
        path = self.target.with_name(f".{self.target.name}.partial")
        super().__init__(path, "conversion", "converting", _KNOWN, CheckpointError)
        self.checkpoint, self.records = path / "checkpoint", path / "records"
        self.streams, self._old = path / "streams", path / "old"
        self.trained, self._training = path / "trained", path / "training"
        self._solved = path / "recipe.yaml"

    def check_space(self, weights: int, streams: int, *, resume: bool) -> None:
        """Refuse to begin what the disk has no space for.

        Args:
            weights: bytes of the checkpoint's weights.
            streams: bytes of hidden states beside them while the work lasts.
            resume: count what is there already.

        Raises:
            UnfinishedError: if less is free than is needed to continue.
            CheckpointError: if less is free than is needed to begin.
        """
        parent = next(folder for folder in self.path.parents if folder.exists())
        kept = resume and self.exists
        places = (self.checkpoint, self.streams) if kept else ()
        there = sum(f.stat().st_size for p in places for f in p.glob("*") if f.is_file())
        free = shutil.disk_usage(parent).free
        if weights - there + streams > free:
            beside = f", hidden states beside them {streams:,}," if streams else ""
            raise self._unfinished(
                f"no space left for it; its weights take {weights:,} bytes{beside} and {free:,} "
                "are free. Free some space or choose another disk.",
                kept=kept,
            )

    def published(self, key: Mapping[str, str]) -> Report | None:
        """Return the report of a conversion that was killed once all was done but clearing up.

        Args:
            key: what the result depends on now, in parts at least.
        """
        if not self.path.is_dir() or self.path.is_symlink():
            return None
        data = self.load() or {}
        names = {folder.name for folder in (self.checkpoint, self.trained)}
        finished = data.get("finished")
        if finished not in names or (self.path / finished).exists():
            return None
        if not key.items() <= data["key"].items():
            return None
        try:
            found = read_report(self.target).report
        except CheckpointError:
            return None
        self.discard()
        return found

    @contextmanager
    def begun(self, key: Mapping[str, str], *, resume: bool) -> Iterator[None]:
        """Hold the folder while it is worked in; it is gone when all went well.

        Args:
            key: what the result depends on.
            resume: continue what is here, if anything is.

        Raises:
            CheckpointError: if another process works here, or something else was begun.
            UnfinishedError: if the disk fails; the folder is kept.
            KeyboardInterrupt: with a note of what is kept.
            SlimError: with what else is wrong; the folder is gone.
        """
        try:
            with self.held():
                self._put_old_back()
                if not (resume and self.resume(key)):
                    self.begin(key)
                try:
                    yield
                except UnfinishedError:
                    raise
                except SlimError:
                    shutil.rmtree(self.path, ignore_errors=True)
                    raise
                shutil.rmtree(self.path, ignore_errors=True)
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(f"what is done is kept in {self.path}, continue it with --resume")
            raise
        except Exception as error:
            problem = disk_problem(error)
            if problem is None:
                raise
            raise self._unfinished(problem, kept=self.exists) from error

    def publish(self, key: Mapping[str, str], finished: Path) -> None:
        """Put the finished checkpoint, one of the folders here, in its place."""
        self.save(key, finished=finished.name)
        publish(finished, self.target, self._old)

    def solved(self) -> Recipe | None:
        """Return the recipe that `keep_solved` wrote, if it did."""
        try:
            return Recipe.load(self._solved) if self._solved.is_file() else None
        except SlimError:
            return None

    def keep_solved(self, recipe: Recipe) -> None:
        """Keep a recipe with the sizes that a budget comes to."""
        write_whole(self._solved, recipe_yaml(recipe))

    def snapshot(self) -> dict[str, Tensor] | None:
        """Return the last state of a training end to end, None where there is none."""
        try:
            return load_file(self._training / _STATE)
        except (OSError, SafetensorError):  # not there, or not what was written
            return None

    def keep_snapshot(self, state: Mapping[str, Tensor]) -> None:
        """Keep a state of a training end to end in place of the one before."""
        self._training.mkdir(exist_ok=True)
        with replacing(self._training / _STATE) as path:
            save_file({name: value.contiguous() for name, value in state.items()}, path)

    def clear_trained(self) -> None:
        """Remove what a kill left of writing the trained checkpoint."""
        for path in (self.trained, *self.path.glob(f".{self.trained.name}.partial-*")):
            remove(path)

    def discard(self) -> None:
        """Throw away what is unfinished here, if anything is.

        Raises:
            CheckpointError: if another process works here.
        """
        if self.exists:
            with self.held():
                self._put_old_back()
                shutil.rmtree(self.path)

    def _put_old_back(self) -> None:
        """Undo a replacement that was killed between its two renames."""
        if self._old.exists() and not self.target.exists():
            self._old.rename(self.target)
        remove(self._old)

    def _unfinished(self, problem: str, *, kept: bool) -> CheckpointError:
        more = f" What is done is kept in {self.path}: continue it with --resume." if kept else ""
        kind = UnfinishedError if kept else CheckpointError
        return kind(f"{self.given}: {problem}{more}")


def key_of(request: Request, text: Windows | None = None) -> dict[str, str]:
    """Return what the result of a conversion depends on, part by part.

    A file of weights goes by its size, the time of its last change, its header and samples of its
    content, since reading all of it would take as long as the conversion; a small file by its
    content.

    Args:
        request: the conversion.
        text: what it fits to, once that is read.
    """
    key = {
        "the model": request.source.given,
        "the recipe": recipe_yaml(request.recipe),
        **versions(torch, transformers, safetensors),
    }
    for option in fields(request.options):
        if option.metadata.get("in_key"):
            value = getattr(request.options, option.name)
            shown = ", ".join(value) or None if isinstance(value, tuple) else value
            key[f"--{option.name.replace('_', '-')}"] = str(shown)
    for path in input_files(request.source):
        about = path.stat()
        parts = [str(about.st_size), _content(path, about.st_size)]
        if path.suffix == ".safetensors":
            parts.append(str(about.st_mtime_ns))
        key[f"the file {path.name}"] = " ".join(parts)
    if text is not None:
        key["--device"] = str(request.device)
        digest = hashlib.sha256()
        for ids in (text.ids, text.held_out):
            digest.update(f"{tuple(ids.shape)}".encode() + ids.contiguous().numpy().tobytes())
        key["the calibration text"] = digest.hexdigest()
    return key


def _content(path: Path, size: int) -> str:
    """Return the SHA-256 of a file's beginning and, of weights, of samples spread over the rest."""
    with path.open("rb") as file:
        content = file.read(_HEAD)
        if path.suffix != ".safetensors":
            return hashlib.sha256(content).hexdigest()
        start = 8 + int.from_bytes(content[:8], "little")
        digest = hashlib.sha256(content[:start])
        for sample in range(_SAMPLES):
            file.seek(start + max(0, size - start - _SAMPLE) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
