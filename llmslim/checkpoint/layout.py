"""Say where every tensor of a checkpoint lies, before there is one to write.

Names, shapes and types settle it: which shard a tensor is in (the hub's own rule, as
`save_pretrained` has it), the header of each shard, and the place of each tensor in it. Tensors can
then be written in any order, by a process that was interrupted too, and the files come out as
safetensors writes them, byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from llmslim.errors import CheckpointError

from .safetensors_io import INDEX, WEIGHTS

MAX_SHARD_SIZE = "50GB"
"""What `save_pretrained` does by itself."""

# As safetensors calls them and orders them in a file.
_TYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_TYPES = {name: dtype for dtype, name in _TYPES.items()}
"""Types by the name that safetensors gives them."""
_RANKS = {dtype: rank for rank, dtype in enumerate(_TYPES)}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Span(NamedTuple):
    """Where one tensor is."""

    file: str
    start: int
    """First byte in the file."""
    stop: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Layout:
    """The weight files of a checkpoint."""

    headers: dict[str, bytes]
    """By file name; what each file begins with."""
    sizes: dict[str, int]
    """By file name."""
    spans: dict[str, Span]
    """By tensor name."""
    index: str | None
    """Text of the index; None where one file holds all."""

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], *, parameters: int, max_shard_size: int | str
    ) -> Layout:
        """Lay out tensors.

        Args:
            tensors: names, in the model's order, with tensors of their shapes and types; those
                on the meta device will do.
            parameters: number of parameters, for the index.
            max_shard_size: bytes in one file.

        Raises:
            CheckpointError: if there are none, or one is of a type that is not written.
        """
        unknown = {str(tensor.dtype) for tensor in tensors.values() if tensor.dtype not in _TYPES}
        if unknown or not tensors:
            raise CheckpointError(
                f"weights of type {', '.join(sorted(unknown)) or 'none'}; allowed "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in _TYPES)}."
            )
        split = split_torch_state_dict_into_shards(
            dict(tensors),
            filename_pattern=WEIGHTS.replace(".", "{suffix}.", 1),
            max_shard_size=parse_size(max_shard_size),
        )
        headers, sizes, spans = {}, {}, {}
        for file, names in split.filename_to_tensors.items():
            order = sorted(names, key=lambda name: (_RANKS[tensors[name].dtype], name))
            entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
            places: dict[str, tuple[int, int]] = {}
            end = 0
            for name in order:
                shape, dtype = tuple(tensors[name].shape), tensors[name].dtype
                start, end = end, end + prod(shape) * dtype.itemsize
                places[name] = (start, end)
                entries[name] = {
                    "dtype": _TYPES[dtype],
                    "shape": list(shape),
                    "data_offsets": [start, end],
                }
            text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
            text += b" " * (-len(text) % 8)
            headers[file] = len(text).to_bytes(8, "little") + text
            sizes[file] = len(headers[file]) + end
            first = len(headers[file])
            for name, (start, stop) in places.items():
                about = tuple(tensors[name].shape), tensors[name].dtype
                spans[name] = Span(file, first + start, first + stop, *about)
        index = None
        if split.is_sharded:
            metadata = {"total_parameters": parameters, **split.metadata}
            data = {"metadata": metadata, "weight_map": split.tensor_to_filename}
            index = json.dumps(data, indent=2, sort_keys=True) + "\n"
        return cls(headers, sizes, spans, index)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all weight files, the index among them."""
        return (*self.sizes, *(() if self.index is None else (INDEX,)))


def parse_size(size: int | str) -> int:
    """Return a number of bytes, given as such or as text.

    Args:
        size: `5GB`, `500MB`, `5000000`; units are powers of ten, as on the hub.

    Raises:
        CheckpointError: if it is no size.

    Example:
        >>> parse_size("1.5GB")
        1500000000
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)B?", str(size).strip().upper())
    number = 0 if match is None else int(float(match[1]) * _UNITS[match[2]])
    if number < 1:
        raise CheckpointError(
            f"max_shard_size: {size!r}; a number of bytes, or of KB, MB, GB or TB. Write 5GB."
        )
    return number
