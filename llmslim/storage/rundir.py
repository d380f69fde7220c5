"""A folder of unfinished work: one process at a time, and what its result depends on.

    FOLDER/
        lock        held by the process that works here
        run.json    the key: what the result depends on, part by part; and what else is to be known
        ...         what is done

A key has a name and a value for each part. Contents go by their SHA-256; their names begin with
`the`, so that a message states that they have changed and not from which digest to which.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmslim._version import __version__
from llmslim.atomic import write_whole
from llmslim.compat import CONFIG_ORIGIN
from llmslim.errors import SlimError, and_more

from .safetensors_io import read_json_if_whole

try:
    import fcntl
except ImportError:  # Windows: it is for the user to run one process
    fcntl = None  # type: ignore[assignment]

LOCK, RUN = "lock", "run.json"
_FORMAT = 3
_SHOWN = 5
_PIECE = 1 << 24  # numbers that are hashed at once


class RunDir:
    """A folder of unfinished work.

    Args:
        path: the folder; made by `held`.
        noun: what is unfinished, for messages: `conversion`.
        verb: what a process does here: `converting`.
        known: names of what such work keeps, beside the lock and the key.
        error: class of what is raised.
    """

    def __init__(
        self, path: Path, noun: str, verb: str, known: re.Pattern[str], error: type[SlimError]
    ) -> None:
        self.path, self._noun, self._verb = path, noun, verb
        self._known, self._error = known, error

    @property
    def exists(self) -> bool:
        """Whether something is here."""
        return os.path.lexists(self.path)

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse what cannot be begun or resumed here.

        Args:
            resume: whether unfinished work is to be continued.
            overwrite: whether it may be thrown away.

        Raises:
            SlimError: if something unfinished is here and neither is so, another process works
                here, or what is here is something else.
        """
        if not self.exists:
            return
        entries = list(self.path.iterdir()) if self.path.is_dir() else []
        names = [one.name for one in entries if one.name not in (LOCK, RUN, f".{RUN}.new")]
        strange = self.path.is_symlink() or not self.path.is_dir()
        if strange or any(map(Path.is_symlink, entries)) or not all(map(self._known.match, names)):
            raise self._error(
                f"{self.path}: not an unfinished {self._noun}; it is where one would be kept, in "
                "plain files and folders. Move it away."
            )
        if not resume and not overwrite:
            with suppress(OSError), self.held():
                pass  # what another process is working at is not unfinished
            raise self._error(
                f"{self.path}: an unfinished {self._noun} is here. Continue it (--resume), or "
                "throw it away and start over (--overwrite)."
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out while the context lasts; make the folder.

        Raises:
            SlimError: if another process works here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path, self._verb, self._error):
            yield

    def begin(self, key: Mapping[str, Any]) -> None:
        """Empty the folder, which is held, and write down what the result depends on."""
        (self.path / RUN).unlink(missing_ok=True)
        for entry in self.path.iterdir():
            remove(entry, ignore=LOCK)
        self.save(key)

    def save(self, key: Mapping[str, Any], **more: Any) -> None:
        """Write down what the result depends on, and more."""
        write_whole(self.path / RUN, json.dumps({"format": _FORMAT, "key": dict(key), **more}))

    def load(self) -> dict[str, Any] | None:
        """Return what `save` wrote; None where it is not there, or not as it should be."""
        data = read_json_if_whole(self.path / RUN)
        good = data.get("format") == _FORMAT and isinstance(data.get("key"), dict)
        return data if good else None

    def resume(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what `save` wrote, for work that is to be continued; None where nothing was.

        Args:
            key: what the result depends on now.

        Raises:
            SlimError: if that is not what was begun.
        """
        data = self.load()
        changed = what_changed(data["key"], json.loads(json.dumps(dict(key)))) if data else ""
        if changed:
            raise self._error(
                f"{self.path}: another {self._noun} was begun here; {changed}. Resume with the "
                "same inputs and options, or start over (--overwrite)."
            )
        return data


def remove(path: Path, *, ignore: str = "") -> None:
    """Remove a file, a link or a folder, unless it has a name that is to be ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.name != ignore:
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, doing: str, error: type[SlimError]) -> Iterator[None]:
    """Lock a folder for as long as the context, or the process, lasts.

    Args:
        folder: exists.
        doing: what a process does here, for the message: `converting`.
        error: class of what is raised.

    Raises:
        SlimError: of that class, if another process holds the lock.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(folder / LOCK, flags, 0o644)
    try:
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as busy:
            raise error(
                f"{folder}: another process is {doing} to this place. Wait for it, or choose "
                "another name."
            ) from busy
        yield
    finally:
        os.close(descriptor)


def versions(*libraries: Any) -> dict[str, str]:
    """Return the versions of llmslim and of what it computes with, as parts of a key."""
    known = {"llmslim": __version__, **{one.__name__: one.__version__ for one in libraries}}
    return {f"version of {name}": str(version) for name, version in known.items()}


def add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Add a tensor's name, type, shape and bytes to a digest of hashlib."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    for piece in tensor.detach().reshape(-1).split(_PIECE):
        digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())


def model_digest(model: Any) -> str:
    """Return the SHA-256 of a model's class, config and weights.

    Args:
        model: in memory, on any device.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    config = {k: v for k, v in model.config.to_dict().items() if k not in CONFIG_ORIGIN}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        add_tensor(digest, name, tensor)
    return digest.hexdigest()


def what_changed(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in which parts two keys differ, the first few of them; empty where in none.

    Args:
        begun: of the work that was cut short.
        now: of the work that is to be done.

    Example:
        >>> what_changed({"the model": "a1", "seed": 1, "tau": 2}, {"the model": "b2", "seed": 3})
        'the model has changed; seed was 1 and is 3; tau was 2 and is None'
    """
    names = sorted(
        (name for name in {*begun, *now} if begun.get(name) != now.get(name)),
        key=lambda name: (not name.startswith("the "), name),
    )
    return and_more([_difference(n, begun, now) for n in names], _SHOWN, "; ")


def _difference(name: str, begun: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if name.startswith("the "):
        return f"{_shown(name)} has changed"
    return f"{_shown(name)} was {_shown(begun.get(name))} and is {_shown(now.get(name))}"


def _shown(value: Any) -> str:
    """Return a value in a few words; it may be from a file that somebody else wrote."""
    text = str(value)[:80]
    return text if text.isprintable() else repr(text)
