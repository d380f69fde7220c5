"""The folder of a healing that is not finished: what is needed to go on after a kill.

    OUT.healing/
        lock             held by the process that works here
        run.json         what the result depends on, and what was measured before the first step
        history.jsonl    a line per step and per measurement
        teacher_logits.safetensors    with `store_teacher`
        checkpoint-N/    the Trainer's: trained parameters, optimiser, schedule, random numbers

It stands beside the checkpoint that is to be written, and goes when that one is whole.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmslim.checkpoint import LOCK, lock, locked, what_changed
from llmslim.errors import HealingError, UnfinishedError

FORMAT = 2
RUN = "run.json"
HISTORY = "history.jsonl"
TRAINER_STATE = "trainer_state.json"
"""The last file that the Trainer writes into a checkpoint: with it, the checkpoint is whole."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How systems say that a disk is full."""
_OTHERS = re.compile(r"(checkpoint-\d+|tmp-checkpoint-\d+|teacher_logits\.safetensors(\..+)?)$")


def working_folder(out: Path) -> Path:
    """Return where a healing that will be written to `out` keeps what it needs to go on."""
    return out.with_name(f"{out.name}.healing")


class Work:
    """A working folder.

    Args:
        path: the folder; made by `begin`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.history: list[dict[str, Any]] = []
        self._unlock: Callable[[], Any] | None = None

    @property
    def exists(self) -> bool:
        """Whether a healing was begun here."""
        return (self.path / RUN).is_file()

    def check_free(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder in which a healing was begun.

        Args:
            resume: whether it is to go on.
            overwrite: whether it may be thrown away.

        Raises:
            HealingError: if it is there and neither is so.
        """
        if self.exists and not resume and not overwrite:
            with suppress(OSError), locked(self.path, "healing", HealingError):
                pass  # what another process is working at is not unfinished
            raise HealingError(
                f"{self.path}: an unfinished healing is here. Go on with it (--resume), or throw "
                "it away (--overwrite)."
            )

    def hold(self) -> None:
        """Keep other processes out, until `release` or until this one ends; make the folder.

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

    def release(self) -> None:
        """Let other processes in."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None

    def _is_ours(self) -> bool:
        """Return whether all that is here is a healing's, a killed one's included."""
        if not self.path.is_dir():
            return False
        names = {entry.name.removeprefix(".") for entry in self.path.iterdir()}
        return all(name in (LOCK, RUN, HISTORY) or _OTHERS.match(name) for name in names)

    def begin(self, key: Mapping[str, Any]) -> None:
        """Empty the folder, which is held, and begin.

        Args:
            key: what the result depends on.
        """
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != LOCK:
                entry.unlink()
        self.history = []
        self.save({"format": FORMAT, "key": key})

    def save(self, data: Mapping[str, Any]) -> None:
        """Write run.json, whole or not at all."""
        partial = self.path / f".{RUN}"
        partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.path / RUN)

    def load(self, key: Mapping[str, Any]) -> dict[str, Any]:
        """Return run.json of a healing that is to go on.

        Args:
            key: what the result depends on now.

        Raises:
            HealingError: if that is not what was begun.
        """
        try:
            data: dict[str, Any] = json.loads((self.path / RUN).read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise HealingError(
                    f"{self.path}: a healing was begun here by another version of llmslim. Begin "
                    "anew (--overwrite)."
                )
            changed = what_changed(data["key"], json.loads(json.dumps(key)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise HealingError(
                f"{self.path / RUN}: cannot be read ({error}). Begin anew (--overwrite)."
            ) from error
        if changed:
            raise HealingError(
                f"{self.path}: another healing was begun here; {changed}. Resume with the same "
                "model, text, teacher and settings, or begin anew (--overwrite)."
            )
        return data

    def last_checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint; those cut short are removed."""
        whole: dict[int, Path] = {}
        for folder in self.path.glob("checkpoint-*"):
            step = re.fullmatch(r"checkpoint-(\d+)", folder.name)
            try:
                json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                shutil.rmtree(folder, ignore_errors=True)
            else:
                if step:
                    whole[int(step[1])] = folder
        return whole[max(whole)] if whole else None

    def rewind(self, step: int, *, write: bool) -> None:
        """Read the history up to a step, and forget what came after it.

        Args:
            step: where the training goes on.
            write: whether the file forgets it too; one process of several does that.

        Raises:
            HealingError: if it cannot be read.
        """
        file = self.path / HISTORY
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
            partial = self.path / f".{HISTORY}"
            partial.write_text(history_text(self.history), encoding="utf-8")
            partial.replace(file)

    def note(self, entry: dict[str, Any], *, write: bool) -> None:
        """Add a line to the history.

        Args:
            entry: what to note.
            write: whether it goes to the file too; one process of several does that.
        """
        self.history.append(entry)
        if write:
            with (self.path / HISTORY).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def remove(self) -> None:
        """Remove the folder: its healing is finished."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()


def history_text(lines: Iterable[Mapping[str, Any]]) -> str:
    """Return a history as JSONL."""
    return "".join(json.dumps(dict(line)) + "\n" for line in lines)


def explain_full_disk(error: Exception, folder: Path, *, kept: bool) -> None:
    """Raise a full disk as what it is.

    Args:
        error: what went wrong.
        folder: the working folder.
        kept: whether there is anything to go on with.

    Raises:
        UnfinishedError: if the disk was full, and there is.
        HealingError: if the disk was full, and there is not.
    """
    said = str(error)
    number = error.errno if isinstance(error, OSError) else None
    found = re.search(r"\(os error (\d+)\)", said)
    number = int(found[1]) if found and number is None else number
    # torch.save's archive writer gives no number.
    if number in FULL or "PytorchStreamWriter" in said or "inline_container" in said:
        full = f"{folder}: no space left for the state of the training"
        if kept:
            raise UnfinishedError(
                f"{full}; the last whole one is kept. Free some space and resume (--resume)."
            ) from error
        raise HealingError(
            f"{full}; none was saved before. Free some space and begin again."
        ) from error
