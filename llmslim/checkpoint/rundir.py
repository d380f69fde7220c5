"""Keep a second process out of a working folder, for as long as the first one lives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmslim.errors import SlimError

try:
    import fcntl
except ImportError:  # Windows: two processes there are the user's to keep apart
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"
"""Name of the file in the folder."""


def lock(folder: Path, doing: str, error: type[SlimError]) -> int:
    """Lock a folder; close what is returned (`os.close`) to unlock it, or end the process.

    Args:
        folder: exists.
        doing: what a process does here, for the message: `converting`.
        error: of which class that is.

    Raises:
        SlimError: of that class, if another process has it.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(folder / LOCK, flags, 0o644)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as busy:
        os.close(descriptor)
        raise error(
            f"{folder}: another process is {doing} to this place. Wait for it, or choose another "
            "name."
        ) from busy
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def locked(folder: Path, doing: str, error: type[SlimError]) -> Iterator[None]:
    """Lock a folder for as long as the context lasts; arguments and errors as of `lock`."""
    descriptor = lock(folder, doing, error)
    try:
        yield
    finally:
        os.close(descriptor)
