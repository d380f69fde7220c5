"""The folder of an unfinished healing: what is needed to continue after a kill.

    OUT.healing/
        lock             held by the process that works here
        run.json         what the result depends on, and what was measured before the first step
        history.jsonl    a line per step and per measurement
        teacher/         with `store_teacher`: the teacher's likeliest tokens, a file per 32 rows
        checkpoint-N/    the Trainer's: trained parameters, optimiser, schedule, random numbers

It stands beside the checkpoint that healing will write, and goes when that one is whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState

from llmslim.errors import HealingError, UnfinishedError
from llmslim.healing.report import history_text
from llmslim.storage import RUN, RunDir, disk_is_full, write_whole

_TRAINER_STATE = "trainer_state.json"
"""The last file that the Trainer writes into a checkpoint: with it, the checkpoint is whole."""
_KNOWN = re.compile(r"(history\.jsonl|\.history\.jsonl\.new|teacher|(tmp-)?checkpoint-\d+)$")


def folder_beside(out: Path) -> Path:
    """Return the folder of an unfinished healing whose result will be written to `out`."""
    return out.with_name(f"{out.name}.healing")


class HealingDir(RunDir):
    """The working folder of a healing, locked from `opened` to `close`.

    Args:
        path: the folder; made when it is opened.
        resume: continue what is there; with nothing there, a healing begins.
        overwrite: whether an unfinished healing that is there may be thrown away.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        super().__init__(path, "healing", "healing", _KNOWN, HealingError)
        self._resumes, self._overwrites = resume, overwrite
        self.key: Mapping[str, Any] = {}
        """What the result depends on."""
        self.measured: dict[str, Any] = {}
        """What was measured before the first step."""
        self.history: list[dict[str, Any]] = []
        self.teacher, self._history_file = path / "teacher", path / "history.jsonl"
        self._lock = ExitStack()

    def __enter__(self) -> HealingDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def key_digest(self) -> str:
        """SHA-256 of what the result depends on."""
        return hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()

    def check_free(self) -> None:
        """Refuse a folder in which this healing cannot begin or continue.

        Raises:
            HealingError: if an unfinished healing, or something else, is there.
        """
        self.check(resume=self._resumes, overwrite=self._overwrites)

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
            if not disk_is_full(error):
                raise
            full = f"{self.path}: no space left for the state of the training"
            if kept:
                raise UnfinishedError(
                    f"{full}; the last whole one is kept. Free some space and resume (--resume)."
                ) from error
            raise HealingError(
                f"{full}; none was saved before. Free some space and start over."
            ) from error

    def _open(self, key: Mapping[str, Any], state: PartialState) -> None:
        """Begin in an empty folder, or read what an earlier process of this healing measured.

        Raises:
            HealingError: if neither is possible.
        """
        resumes = self._resumes and (self.path / RUN).is_file()
        self.check_free()
        state.wait_for_everyone()  # before one process changes what the others check
        if state.is_main_process:
            self._lock.enter_context(self.held())
        self.key = key
        if resumes:
            run = self.resume(key)
            if run is None:
                raise HealingError(f"{self.path / RUN}: cannot be read. Start over (--overwrite).")
            self.measured = {k: v for k, v in run.items() if k not in ("format", "key")}
        elif state.is_main_process:
            self.begin(key)
        state.wait_for_everyone()

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def remove(self) -> None:
        """Remove the folder: its healing is finished."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def add_measured(self, *, write: bool, **values: Any) -> None:
        """Keep measurements from before the first step.

        Args:
            write: whether to save them too; one process of several does.
            values: by name.
        """
        self.measured |= values
        if write:
            self.save(self.key, **self.measured)

    def last_checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint; remove those that were cut short."""
        whole: dict[int, Path] = {}
        for folder in self.path.glob("checkpoint-*"):
            try:
                json.loads((folder / _TRAINER_STATE).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                shutil.rmtree(folder, ignore_errors=True)
            else:
                whole[int(folder.name.removeprefix("checkpoint-"))] = folder
        return whole[max(whole)] if whole else None

    def rewind(self, step: int, *, write: bool) -> None:
        """Read the history up to a step, and forget what came after it.

        Args:
            step: where the training continues.
            write: whether to shorten the file as well; one process of several does.

        Raises:
            HealingError: if it cannot be read.
        """
        file = self._history_file
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
            write_whole(file, history_text(self.history))

    def add_history(self, entry: dict[str, Any], *, write: bool) -> None:
        """Add a line to the history.

        Args:
            entry: the line.
            write: whether to add it to the file as well; one process of several does.
        """
        self.history.append(entry)
        if write:
            with self._history_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
