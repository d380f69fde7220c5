"""Put a finished file or folder in its place by one rename; name what went wrong with the disk."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from llmslim.errors import CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def resolved(out: Path) -> Path:
    """Return a target's place, links followed.

    Args:
        out: the folder to write.

    Raises:
        CheckpointError: if no folder can be there.
    """
    try:
        target = out.resolve()
        os.lstat(target)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # as it should be, or reported later with what can be done about it
    except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, null bytes
        why = error.strerror if isinstance(error, OSError) else str(error).partition(" from ")[0]
        raise CheckpointError(
            f"{out}: not a place for a folder ({why}). Choose another name."
        ) from error
    if not target.name:
        raise CheckpointError(
            f"{out}: the root of all folders; a checkpoint is a folder with a name. Choose one."
        )
    return target


def check_keeps_source(out: Path, source: Path | None, given: str, *, same: bool = False) -> None:
    """Refuse a target whose replacement would remove the model that it is made from.

    Args:
        out: the folder to write.
        source: the model's folder, if it has one.
        given: the model, for messages.
        same: whether the target may be that folder.

    Raises:
        CheckpointError: if the model is in it.
    """
    if source is None:
        return
    target, home = resolved(out), source.resolve()
    if target in home.parents or (target == home and not same):
        raise CheckpointError(
            f"{out}: {given} is in it, which would be removed with what is there. Choose another "
            "name."
        )


def check_target(out: Path, overwrite: bool = False) -> None:
    """Refuse a target that cannot be written, before any work is done for it.

    Args:
        out: the folder to write.
        overwrite: whether a checkpoint that is there already may be replaced.

    Raises:
        CheckpointError: if something is there that may not be replaced, or nothing can be
            written beside it.
    """
    target = resolved(out)
    if os.path.lexists(out):
        if not overwrite:
            raise CheckpointError(
                f"{out}: exists already; a checkpoint is written to a new folder. Choose another "
                "name, or pass overwrite (--overwrite) to replace it."
            )
        if not target.is_dir():
            raise CheckpointError(f"{out}: not a folder; only a folder can be overwritten.")
        if any(target.iterdir()) and not (target / "config.json").is_file():
            raise CheckpointError(
                f"{out}: holds files but no config.json; only a checkpoint or an empty folder can "
                "be overwritten. Choose another name."
            )
    _check_parent(out)


def _check_parent(out: Path) -> None:
    """Refuse a target that nothing can be written beside.

    Raises:
        CheckpointError: if its folder is none, or closed.
    """
    parents = resolved(out).parents
    parent = next(folder for folder in parents if os.path.exists(folder))  # noqa: PTH110  (long names)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{out}: {parent} is not a folder that you can write to.")


def check_file_target(out: Path, overwrite: bool = False) -> None:
    """Refuse a file that cannot be written, before any work is done for it.

    Args:
        out: the file to write.
        overwrite: whether a file that is there already may be replaced.

    Raises:
        CheckpointError: if a folder is there, a file that may not be replaced, or nothing can be
            written beside it.
    """
    resolved(out)
    if os.path.lexists(out):
        if out.is_dir():
            raise CheckpointError(f"{out}: a folder; a file is written. Add a name for it.")
        if not overwrite:
            raise CheckpointError(
                f"{out}: exists already. Choose another name, or pass overwrite (--overwrite) to "
                "replace it."
            )
    _check_parent(out)


@contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """Make a new folder beside `out`, and rename it to `out` if all goes well.

    Raises:
        CheckpointError: if `out` cannot be written; the folder is gone and `out` as it was.
    """
    check_target(out, overwrite)
    target = resolved(out)  # a link to a folder stays a link
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        publish(partial, target, target.with_name(f".{target.name}.old-{secrets.token_hex(4)}"))
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        problem = disk_problem(error)
        if problem is None:
            raise
        raise CheckpointError(f"{out}: {problem}") from error


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears at `path` when the block ends without an error, and only then.

    Its temporary name is random, so several processes may write the same file.
    """
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to, which takes the place of `path` once it is on the disk.

    After an error it is removed, and `path` as it was.
    """
    partial = path.with_name(f".{path.name}.new")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all, whatever happens; it is on the disk."""
    with replacing(path) as partial, partial.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)


def publish(partial: Path, target: Path, aside: Path) -> None:
    """Rename a finished folder; what it replaces is removed only after that.

    Args:
        partial: the finished folder, on the target's disk.
        target: its place.
        aside: where the folder that it replaces, if any, is for the moment between.
    """
    replaces = target.exists()
    if replaces:
        target.rename(aside)
    try:
        partial.rename(target)
    except BaseException:
        if replaces:
            aside.rename(target)
        raise
    flush(target.parent)
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)


def disk_is_full(error: BaseException) -> bool:
    """Return whether an error means that there is no space left."""
    # torch.save's archive writer gives no number.
    lost = "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
    return lost or _error_number(error) in _FULL


def disk_problem(error: BaseException) -> str | None:
    """Return what is wrong with the disk, as the end of a sentence; None if nothing."""
    number = _error_number(error)
    if number is None or isinstance(error, CheckpointError):
        return None
    if number in _FULL:
        why, what = "no space left for it", " Free some space or choose another disk."
    else:
        why, what = "it cannot be written", ""
    return f"{why} ({os.strerror(number)}).{what}"


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def all_files(folder: Path, *without: str) -> list[Path]:
    """Return every file in a folder and in those inside it, in order.

    Args:
        folder: git and the hub put files of theirs in it: names that begin with a dot are left out.
        *without: names of files in it that are left out, too.
    """
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.relative_to(folder).as_posix() not in without
    )


def _error_number(error: BaseException) -> int | None:
    """Return the operating system's error number behind an error, None if there is none."""
    if isinstance(error, OSError):
        return error.errno
    # safetensors' own error class has the number in its text only.
    text = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return int(text[1]) if text else None
