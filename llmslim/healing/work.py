"""The folder of a healing that is not finished: what is needed to go on after a kill.

    OUT.healing/
        run.json         the settings, and what was measured before the first step
        history.jsonl    a line per step and per measurement
        teacher_logits.safetensors    with `store_teacher`
        checkpoint-N/    the Trainer's: trained parameters, optimiser, schedule, random numbers

It stands beside the checkpoint that is to be written, and goes when that one is whole.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmslim.errors import HealingError, UnfinishedError

FORMAT = 1
RUN = "run.json"
HISTORY = "history.jsonl"
TRAINER_STATE = "trainer_state.json"
"""The last file that the Trainer writes into a checkpoint: with it, the checkpoint is whole."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How systems say that a disk is full."""


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
            raise HealingError(
                f"{self.path}: an unfinished healing is here. Go on with it (--resume), or throw "
                "it away (--overwrite)."
            )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Make the folder anew.

        Raises:
            HealingError: if something else is there.
        """
        if self.path.exists() and not self.exists and any(self.path.iterdir()):
            raise HealingError(
                f"{self.path}: holds files, but no unfinished healing; it is where one would be "
                "kept. Move it away."
            )
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        self.history = []
        self.save({"format": FORMAT, "settings": settings})

    def save(self, data: Mapping[str, Any]) -> None:
        """Write run.json, whole or not at all."""
        partial = self.path / f".{RUN}"
        partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.path / RUN)

    def load(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return run.json of a healing that is to go on.

        Args:
            settings: what is asked for now.

        Raises:
            HealingError: if that is not what was begun.
        """
        try:
            data: dict[str, Any] = json.loads((self.path / RUN).read_text(encoding="utf-8"))
            begun, known = data["settings"], data["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HealingError(f"{self.path / RUN}: cannot be read ({error}).") from error
        asked = json.loads(json.dumps(settings))
        changed = sorted(
            key for key in {*begun, *asked} if begun.get(key) != asked.get(key) or not known
        )
        if changed:
            shown = "; ".join(
                f"{key} was {begun.get(key)!r} and is {asked.get(key)!r}" for key in changed[:5]
            )
            raise HealingError(
                f"{self.path}: another healing was begun here; {shown}. Resume with the same "
                "settings, or begin anew (--overwrite)."
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
