"""The folder of a healing that is not finished: what is needed to continue after a kill.

    OUT.healing/
        lock             held by the process that works here
        run.json         what the result depends on, and what was measured before the first step
        history.jsonl    a line per step and per measurement
        teacher/         with `store_teacher`: the teacher's likeliest tokens, a file per 32 rows
        checkpoint-N/    the Trainer's: trained parameters, optimiser, schedule, random numbers

It stands beside the checkpoint that is to be written, and goes when that one is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState

from llmslim.errors import HealingError, UnfinishedError
from llmslim.healing.report import history_text
from llmslim.storage import LOCK, flush, lock, locked, what_changed

_FORMAT = 3
_RUN, _HISTORY, _TEACHER = "run.json", "history.jsonl", "teacher"
_TRAINER_STATE = "trainer_state.json"
"""The last file that the Trainer writes into a checkpoint: with it, the checkpoint is whole."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How systems report that a disk is full."""
_FOLDERS = re.compile(r"(tmp-)?checkpoint-\d+|teacher")


def folder_beside(out: Path) -> Path:
    """Return where a healing that will be written to `out` keeps what it needs to continue."""
    return out.with_name(f"{out.name}.healing")


class HealingDir:
    """A folder in which a healing is begun or continued, locked from `opened` to `close`.

    Args:
        path: the folder; made when it is opened.
        resume: continue what is there; with nothing there, a healing begins.
        overwrite: whether an unfinished healing that is there may be thrown away.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path, self.resume, self.overwrite = path, resume, overwrite
        self.run: dict[str, Any] = {}
        """What run.json holds: `format`, `key`, and what was measured, once that is."""
        self.history: list[dict[str, Any]] = []
        self._unlock: Callable[[], Any] | None = None

    def __enter__(self) -> HealingDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def key_digest(self) -> str:
        """SHA-256 of what the result depends on."""
        return hashlib.sha256(json.dumps(self.run["key"], sort_keys=True).encode()).hexdigest()

    @property
    def teacher(self) -> Path:
        """Where the teacher's likeliest tokens are kept."""
        return self.path / _TEACHER

    def check_free(self) -> None:
        """Refuse a folder in which a healing was begun that is neither continued nor overwritten.

        Raises:
            HealingError: if there is one.
        """
        if self._is_begun() and not self.resume and not self.overwrite:
            with suppress(OSError), locked(self.path, "healing", HealingError):
                pass  # what another process is working at is not unfinished
            raise HealingError(
                f"{self.path}: an unfinished healing is here. Continue it (--resume), or throw "
                "it away (--overwrite)."
            )

    @contextmanager
    def opened(self, key: Mapping[str, Any], state: PartialState) -> Iterator[None]:
        """Begin or continue here; an error before anything was saved removes the folder.

        Args:
            key: what the result depends on.
            state: accelerate's.

        Raises:
            HealingError: if another healing was begun here, another process works here, or the disk
                is full and nothing was saved.
            UnfinishedError: if the disk is full, and what was saved is kept.
        """
        self._open(key, state)
        try:
            yield
        except Exception as error:
            kept = self.last_checkpoint() is not None or any(self.teacher.glob("*.safetensors"))
            if state.is_main_process and not kept:
                self.remove()  # there is nothing to continue
            _explain_full_disk(error, self.path, kept=kept)
            raise

    def close(self) -> None:
        """Let other processes in."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None

    def remove(self) -> None:
        """Remove the folder: its healing is finished."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def save(self) -> None:
        """Write run.json."""
        with replacing(self.path / _RUN) as partial:
            partial.write_text(json.dumps(self.run, indent=2) + "\n", encoding="utf-8")

    def last_checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint; those cut short are removed."""
        whole: dict[int, Path] = {}
        for folder in self.path.glob("checkpoint-*"):
            step = re.fullmatch(r"checkpoint-(\d+)", folder.name)
            try:
                json.loads((folder / _TRAINER_STATE).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                shutil.rmtree(folder, ignore_errors=True)
            else:
                if step:
                    whole[int(step[1])] = folder
        return whole[max(whole)] if whole else None

    def rewind(self, step: int, *, write: bool) -> None:
        """Read the history up to a step, and forget what came after it.

        Args:
            step: where the training continues.
            write: whether to shorten the file as well; one process of several does.

        Raises:
            HealingError: if it cannot be read.
        """
        file = self.path / _HISTORY
        self.history = []
        try:
            for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
                if not line.endswith("}"):  # the last line of a process that was killed
                    break
                entry = json.loads(line)
                if entry["step"] <= step:
                    self.history.append(entry)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HealingError(f"{file}: cannot be read ({error}).") from error
        if write:
            with replacing(file) as partial:
                partial.write_text(history_text(self.history), encoding="utf-8")

    def note(self, entry: dict[str, Any], *, write: bool) -> None:
        """Add a line to the history.

        Args:
            entry: the line.
            write: whether to add it to the file as well; one process of several does.
        """
        self.history.append(entry)
        if write:
            with (self.path / _HISTORY).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def _is_begun(self) -> bool:
        return (self.path / _RUN).is_file()

    def _open(self, key: Mapping[str, Any], state: PartialState) -> None:
        """Make the folder, or check that it is of the same healing.

        Raises:
            HealingError: if something is there that may not be thrown away.
        """
        continues = self.resume and self._is_begun()
        self.check_free()
        state.wait_for_everyone()  # all have looked, before one changes what they looked at
        if state.is_main_process:
            self._lock()
        if continues:
            self.run = self._load(key)
            return
        self.run = {"format": _FORMAT, "key": json.loads(json.dumps(key))}
        if state.is_main_process:
            for entry in self.path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                elif entry.name != LOCK:
                    entry.unlink()
            self.save()
        state.wait_for_everyone()

    def _lock(self) -> None:
        """Keep other processes out; make the folder.

        Raises:
            HealingError: if another process works here, or something else is here.
        """
        if self.path.is_symlink() or (self.path.exists() and not self._is_ours()):
            raise HealingError(
                f"{self.path}: holds files, but no unfinished healing; it is where one would be "
                "kept. Move it away."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._unlock = weakref.finalize(self, os.close, lock(self.path, "healing", HealingError))

    def _is_ours(self) -> bool:
        """Return whether all that is here is a healing's, a killed one's included."""
        if not self.path.is_dir():
            return False
        names = {entry.name.removeprefix(".") for entry in self.path.iterdir()}
        return all(name in (LOCK, _RUN, _HISTORY) or _FOLDERS.fullmatch(name) for name in names)

    def _load(self, key: Mapping[str, Any]) -> dict[str, Any]:
        """Return run.json of a healing that is to be continued.

        Raises:
            HealingError: if that is not what was begun.
        """
        try:
            run: dict[str, Any] = json.loads((self.path / _RUN).read_text(encoding="utf-8"))
            if run["format"] != _FORMAT:
                raise HealingError(
                    f"{self.path}: a healing was begun here by another version of llmslim. Begin "
                    "again (--overwrite)."
                )
            changed = what_changed(run["key"], json.loads(json.dumps(key)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise HealingError(
                f"{self.path / _RUN}: cannot be read ({error}). Begin again (--overwrite)."
            ) from error
        if changed:
            raise HealingError(
                f"{self.path}: another healing was begun here; {changed}. Resume with the same "
                "model, text, teacher and settings, or begin again (--overwrite)."
            )
        return run


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a path to write to; what is there takes the file's place once it is on the disk."""
    partial = file.with_name(f".{file.name}")
    yield partial
    flush(partial)
    partial.replace(file)


def _explain_full_disk(error: Exception, folder: Path, *, kept: bool) -> None:
    """Raise the error of a full disk as one of our own; do nothing for any other.

    Args:
        error: what went wrong.
        folder: where the run is kept.
        kept: whether there is anything to continue.

    Raises:
        UnfinishedError: if the disk was full, and there is.
        HealingError: if the disk was full, and there is not.
    """
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    found = re.search(r"\(os error (\d+)\)", text)
    number = int(found[1]) if found and number is None else number
    # torch.save's archive writer gives no number.
    if number in _FULL or "PytorchStreamWriter" in text or "inline_container" in text:
        full = f"{folder}: no space left for the state of the training"
        if kept:
            raise UnfinishedError(
                f"{full}; the last whole one is kept. Free some space and resume (--resume)."
            ) from error
        raise HealingError(
            f"{full}; none was saved before. Free some space and begin again."
        ) from error
