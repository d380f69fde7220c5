"""The folder of a conversion that is not finished: what is needed to go on after a kill.

    .OUT.partial/
        lock             held by the process that works here
        journal.jsonl    what was begun, and a line for every piece that is done
        checkpoint/      the files as they will be
        streams/         hidden states between decoder layers, for fits to calibration text
        old/             what OUT was, for the moment of replacing it

It stands beside the checkpoint that is to be written, and goes when that one is whole. An error
in what was asked for leaves nothing; whatever may be better next time, an interrupt, a full disk
or a kill, leaves it for `resume`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from llmslim.checkpoint import LOCK, REPORT, disk_problem, locked, publish, resolved
from llmslim.errors import CheckpointError, SlimError, UnfinishedError
from llmslim.surgery import Report

from .journal import Journal

_JOURNAL, _CONFIG = "journal.jsonl", "config"


class Work:
    """A working folder.

    Args:
        target: the checkpoint that is to be written.
    """

    def __init__(self, target: Path) -> None:
        self.given = target
        self.target = resolved(target)  # a link to a folder stays a link
        self.path = self.target.with_name(f".{self.target.name}.partial")
        self.checkpoint = self.path / "checkpoint"
        self.streams = self.path / "streams"
        self._old = self.path / "old"

    @property
    def exists(self) -> bool:
        """Whether a conversion was begun here."""
        return os.path.lexists(self.path)

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse what cannot be begun or resumed here.

        Raises:
            CheckpointError: if something unfinished is here and neither is wanted, another
                process works here, or what is here is no unfinished conversion.
        """
        if not self.exists:
            return
        known = {
            *(LOCK, _JOURNAL, _CONFIG),
            *(self.checkpoint.name, self.streams.name, self._old.name),
        }
        if self.path.is_symlink() or not self.path.is_dir() or set(os.listdir(self.path)) - known:  # noqa: PTH208
            raise CheckpointError(
                f"{self.path}: not an unfinished conversion; it is where one would be kept. "
                "Move it away."
            )
        links = [name for name in known if (self.path / name).is_symlink()]
        if links:
            raise CheckpointError(
                f"{self.path}: {links[0]} is a link; a working folder has none. Move it away."
            )
        if not resume and not overwrite:
            with suppress(OSError), self._locked():
                pass  # what another process is working at is not unfinished
            raise CheckpointError(
                f"{self.path}: an unfinished conversion is here. Go on with it (--resume), or "
                "throw it away and begin anew (--overwrite)."
            )

    def check_space(self, sizes: Mapping[str, int], more: int, *, resume: bool) -> None:
        """Refuse to begin what the disk has no space for.

        Args:
            sizes: bytes of each file of weights, by name.
            more: bytes of what is beside them while the work goes on.
            resume: count what is there already.

        Raises:
            UnfinishedError: if less is free than is needed to go on.
            CheckpointError: if less is free than is needed to begin.
        """
        parent = next(folder for folder in self.path.parents if folder.exists())
        needed, there = sum(sizes.values()), 0
        if resume and self.checkpoint.is_dir():
            files = [self.checkpoint / name for name in sizes]
            files += self.streams.glob("*")
            # What is not written yet takes no blocks.
            there = sum(512 * getattr(f.stat(), "st_blocks", 0) for f in files if f.is_file())
        free = shutil.disk_usage(parent).free
        if needed - there + more > free:
            beside = f", hidden states beside them {more:,}," if more else ""
            kept = resume and self.exists
            kind = UnfinishedError if kept else CheckpointError
            raise kind(
                f"{self.given}: no space left for it; its weights take {needed:,} bytes{beside} "
                f"and {free:,} are free. Free some space or choose another disk."
                f"{self._how_to_go_on() if kept else ''}"
            )

    def published(self, key: Mapping[str, str]) -> Report | None:
        """Return the report of a conversion that was killed once all was done but clearing up.

        Args:
            key: what the result depends on now.
        """
        if not self.path.is_dir() or self.checkpoint.exists() or self.path.is_symlink():
            return None
        journal = Journal(self.path / _JOURNAL)
        if not (self.target.is_dir() and journal.is_finished(key)):
            return None
        try:
            data = json.loads((self.target / REPORT).read_text(encoding="utf-8"))
            report = Report.from_dict(data, where=str(self.target / REPORT))
        except (OSError, ValueError, RecursionError):
            return None
        with self._locked():
            shutil.rmtree(self.path)
        return report

    @contextmanager
    def begun(self, key: Mapping[str, str], *, resume: bool) -> Iterator[Journal]:
        """Hold the folder while it is worked in; it is gone when all went well.

        Args:
            key: what the result depends on.
            resume: go on with what is here, if anything is.

        Raises:
            CheckpointError: if another process works here, or something else was begun.
            UnfinishedError: if the disk fails; the folder is kept.
            SlimError: with what else is wrong; the folder is gone.
        """
        going_on = resume and (self.path / _JOURNAL).is_file()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._put_old_back()
                journal = Journal(self.path / _JOURNAL)
                if going_on:
                    journal.resume(key)
                else:
                    shutil.rmtree(self.checkpoint, ignore_errors=True)
                    shutil.rmtree(self.streams, ignore_errors=True)
                    journal.begin(key)
                self.checkpoint.mkdir(exist_ok=True)
                with self._cleared_up(journal):
                    yield journal
        except Exception as error:
            problem = disk_problem(error)
            if problem is None:
                raise
            kept = self.exists
            kind = UnfinishedError if kept else CheckpointError
            more = self._how_to_go_on() if kept else ""
            raise kind(f"{self.given}: {problem}{more}") from error

    def _how_to_go_on(self) -> str:
        return f" What is done is kept in {self.path}: go on with --resume."

    def discard(self) -> None:
        """Throw away what is unfinished here, if anything is.

        Raises:
            CheckpointError: if another process works here.
        """
        if self.exists:
            with self._locked():
                self._put_old_back()
                shutil.rmtree(self.path)

    def _put_old_back(self) -> None:
        """Undo a replacement that was killed between its two renames."""
        if self._old.exists() and not self.target.exists():
            self._old.rename(self.target)
        shutil.rmtree(self._old, ignore_errors=True)

    def publish(self, journal: Journal) -> None:
        """Put the finished checkpoint in its place."""
        journal.finish()
        publish(self.checkpoint, self.target, self._old)

    @contextmanager
    def _cleared_up(self, journal: Journal) -> Iterator[None]:
        """Remove the folder when all is done, or what was asked for is wrong.

        Raises:
            SlimError: as it was.
            KeyboardInterrupt: with a note of what is kept.
        """
        try:
            yield
        except SlimError:
            journal.close()
            shutil.rmtree(self.path, ignore_errors=True)
            raise
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(f"what is done is kept in {self.path}, go on with --resume")
            raise
        finally:
            journal.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def _locked(self) -> AbstractContextManager[None]:
        return locked(self.path, "converting", CheckpointError)
