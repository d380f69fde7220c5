"""Check a GGUF file before anything is built from it.

A GGUF file begins with its metadata, keys and typed values, and a table of its tensors. The readers
build a config from the metadata, layer by layer, and trust each length; so lengths are compared
with the file's size here, and numbers against the limits that a config.json has. Tensor
data is not read.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
import struct
from math import prod
from pathlib import Path
from typing import BinaryIO, NoReturn

from llmslim.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Types of one number each, by their code, as `struct` calls them."""
_STRING, _ARRAY = 8, 9
_DEEPEST = 4
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_NAME = 1000
_MAX_DIMENSIONS = 8
_MOST = (
    (re.compile(r"\.(block|layer|nextn_predict_layers)(_count)?$"), 1 << 12),
    (re.compile(r"_count(_\w+)?$"), 1 << 20),
    (re.compile(r"(_length(_\w+)?|_size|_dim|_rank|dimension_count|_window)$"), 1 << 32),
)
"""What integers may be at most; the first pattern that fits a key holds."""


def check_gguf(path: Path) -> str:
    """Refuse a GGUF file whose metadata cannot be true.

    Args:
        path: the file.

    Returns:
        Its architecture, as llama.cpp names it; empty where the file has none.

    Raises:
        CheckpointError: if it is no GGUF file, is cut short, or asks for a model beyond all that
            there are.
    """
    try:
        with path.open("rb") as file:
            return _Header(path, file).check()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error


class _Header:
    """A walk through the beginning of one file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = path.stat().st_size
        self.order = "<"

    def check(self) -> str:
        if self.file.read(4) != _MAGIC:
            self.refuse("does not begin as one")
        version = self.number("I")
        if version & 0xFFFF == 0:  # written on a machine with the other order of bytes
            self.order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in _VERSIONS:
            self.refuse(f"is of version {version}")
        tensors, keys = self.number("Q"), self.number("Q")
        if tensors > _MAX_TENSORS or keys > _MAX_KEYS:
            self.refuse(f"claims to hold {tensors:,} tensors and {keys:,} keys")
        architecture = ""
        for _ in range(keys):
            name, kind = self.name(), self.number("I")
            if name == "general.architecture" and kind == _STRING:
                architecture = self.name()
            else:
                self.value(name, kind, 0)
        for _ in range(tensors):
            name, count = self.name(), self.number("I")
            if count > _MAX_DIMENSIONS:
                self.refuse(f"gives {name} {count:,} dimensions")
            shape = [self.number("Q") for _ in range(count)]
            if prod(size or 1 for size in shape) >= 1 << 63:
                self.refuse(f"gives {name} a shape beyond all memory")
            self.number("I")
            if self.number("Q") > self.size:
                self.refuse(f"puts {name} behind its own end")
        return architecture

    def value(self, key: str, kind: int, depth: int) -> None:
        """Pass over a value, and look at it where it is an integer.

        Raises:
            CheckpointError: if it is larger than any model has it.
        """
        if kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if depth == _DEEPEST:
                self.refuse(f"nests {key} more than {_DEEPEST} deep")
            if inner in _NUMBERS and not (_integer(inner) and _most(key)):
                self.skip(count * struct.calcsize(f"={_NUMBERS[inner]}"))
                return
            if count > self.size:  # each takes a byte at least
                self.refuse("is cut short")
            for _ in range(count):
                self.value(key, inner, depth + 1)
        elif kind in _NUMBERS:
            number = self.number(_NUMBERS[kind])
            most = _most(key) if _integer(kind) else None
            if most is not None and not -most <= number <= most:
                raise CheckpointError(f"{self.path}: {key} {number:,}; allowed at most {most:,}.")
        else:
            self.refuse(f"gives {key} a type that is not known, {kind}")

    def name(self) -> str:
        length = self.number("Q")
        if length > _MAX_NAME:
            self.refuse(f"has a name of {length:,} bytes")
        text = self.read(length).decode("utf-8", "replace")
        if not text.isprintable():
            self.refuse("has a name in unprintable characters")
        return text

    def number(self, code: str) -> int:
        found: int = struct.unpack(self.order + code, self.read(struct.calcsize(f"={code}")))[0]
        return found

    def read(self, length: int) -> bytes:
        data = self.file.read(length)
        if len(data) != length:
            self.refuse("is cut short")
        return data

    def skip(self, length: int) -> None:
        if length > self.size - self.file.tell():
            self.refuse("is cut short")
        self.file.seek(length, 1)

    def refuse(self, why: str) -> NoReturn:
        raise CheckpointError(
            f"{self.path}: not a whole GGUF file; it {why}. Download or copy it again."
        )


def _integer(kind: int) -> bool:
    return _NUMBERS[kind] not in "fd?"


def _most(key: str) -> int | None:
    return next((most for pattern, most in _MOST if pattern.search(key)), None)
