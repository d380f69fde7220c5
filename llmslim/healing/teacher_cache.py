"""Write down what the teacher says of every row, before training; `stored.py` says in what form.

The file is filled under another name, each process its share of the rows, and gets its own when it
is whole. How far each process is, is noted beside it once the rows are safely on disk.

Shapes: N = rows of a batch, L = tokens of a row, T = all tokens of a batch, C = tokens of a chunk,
P = places that predict, K = top_k, V = vocabulary.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from accelerate import PartialState
from torch import Tensor

from llmslim.errors import HealingError
from llmslim.healing.measure import Collate
from llmslim.healing.objectives._chunks import CHUNK_NUMBERS
from llmslim.healing.restoring import to_compute
from llmslim.healing.stored import FILE, StoredLogits
from llmslim.healing.trainer import HealingTrainer
from llmslim.healing.watch import Progress
from llmslim.healing.rundir import FULL
from llmslim.surgery import quietly

TOP_K = 64
"""Tokens kept of each place where the recipe does not say."""
SAVE_SECONDS = 10.0
"""Between two notes of how far it is; so much is computed again after a kill."""

_NAMES = {torch.int64: "I64", torch.int32: "I32", torch.float32: "F32", torch.bfloat16: "BF16"}


def is_begun(folder: Path) -> bool:
    """Return whether a working folder holds such a file, whole or in part."""
    return (folder / FILE).is_file() or (folder / f".{FILE}").is_file()


def ask_once(
    trainer: HealingTrainer,
    rows: Any,
    measured: dict[str, Any],
    state: PartialState,
    tell: Progress,
) -> None:
    """Ask the teacher all that will be needed, or find it asked, then let go of it.

    The model leaves the device meanwhile: the two never share it. The trainer then has `stored` and
    no teacher.

    Args:
        trainer: has model and teacher.
        rows: to train on; the trainer's say which they are.
        measured: what was measured already; the teacher's loss is added and saved.
        state: accelerate's; rows are spread over the processes.
        tell: told how many rows are done.

    Raises:
        HealingError: if the disk has no room for it, or a file is there and cannot be read.
    """
    teacher, spec, device = trainer.teacher, trainer.spec, trainer.args.device
    model: Any = trainer.model

    def load() -> Any:
        model.to("cpu")
        to_compute(teacher, device, bf16=trainer.bf16)
        return teacher

    trainer.stored = store(
        trainer.work.path,
        load,
        rows,
        trainer.data_collator,
        top_k=spec.top_k or TOP_K,
        temperature=spec.temperature,
        bf16=trainer.bf16,
        micro_batch=spec.micro_batch,
        position_ids=trainer.position_ids,
        state=state,
        progress=tell if state.is_main_process else quietly,
    )
    if "teacher" not in measured:
        measures = trainer.eval_dataset is not None
        measured["teacher"] = trainer.measure(load()) if measures else None
        if state.is_main_process:
            trainer.work.save(measured)
    trainer.teacher = None
    teacher.to("cpu")
    if spec.teacher is not None:  # loaded for this alone
        for tensor in (*teacher.parameters(), *teacher.buffers()):
            tensor.data = torch.empty(0, dtype=tensor.dtype)
    if not trainer.is_fsdp_enabled:  # which brings it there in pieces
        model.to(device)


def store(
    folder: Path,
    load: Callable[[], Any],
    rows: Any,
    collate: Collate,
    *,
    top_k: int,
    temperature: float,
    bf16: bool,
    micro_batch: int,
    position_ids: bool,
    state: PartialState,
    progress: Callable[[int, int, str], None],
) -> StoredLogits:
    """Let the teacher see every row once and keep what it says, or go on with that.

    Args:
        folder: the working folder.
        load: returns the teacher on the device; not called where the file is whole.
        rows: what it is to see; the file knows them by their index.
        collate: makes a batch of some rows.
        top_k: tokens kept of each place.
        temperature: divides the logits.
        bf16: whether the arithmetic is bfloat16.
        micro_batch: rows of one call.
        position_ids: whether the teacher takes these.
        state: accelerate's; rows are spread over the processes.
        progress: told how many rows are done.

    Raises:
        HealingError: if the disk has no room for it.
    """
    file = folder / FILE
    if file.is_file():
        return StoredLogits(file)
    partial = folder / f".{FILE}"
    teacher = load()
    vocabulary = teacher.get_output_embeddings().weight.shape[0]
    layout = _Layout(
        len(rows), min(top_k, vocabulary), torch.bfloat16 if bf16 else torch.float32, temperature
    )
    if state.is_main_process and not partial.is_file():
        _reserve(partial, _begins(rows), layout)
    state.wait_for_everyone()
    each = math.ceil(len(rows) / state.num_processes)
    mine = range(len(rows))[state.process_index * each : (state.process_index + 1) * each]
    noted = folder / f".{FILE}.{state.process_index}"
    done = int(noted.read_text("utf-8")) if noted.is_file() else 0
    saved = time.monotonic()
    with partial.open("r+b") as out:
        at = _read_begins(out)
        while done < len(mine):
            progress(mine[done], len(rows), "storing the teacher's logits")
            which = mine[done : done + micro_batch]
            batch = collate([rows[index] for index in which])
            found = _top(teacher, batch, layout, bf16=bf16, position_ids=position_ids)
            _write(out, at, which, found)
            done += len(which)
            if time.monotonic() - saved >= SAVE_SECONDS or done == len(mine):
                _note(out, noted, done)
                saved = time.monotonic()
    state.wait_for_everyone()
    if state.is_main_process:
        partial.replace(file)
        for noted in folder.glob(f".{FILE}.*"):
            noted.unlink()
    state.wait_for_everyone()
    return StoredLogits(file)


@dataclass(frozen=True)
class _Layout:
    """What the file holds."""

    rows: int
    top_k: int
    dtype: torch.dtype
    temperature: float

    @property
    def bytes_per_place(self) -> int:
        return 4 + self.top_k * (4 + self.dtype.itemsize)

    def header(self, places: int) -> bytes:
        """Return the file's header; tensors lie one behind the other, those of wide types first."""
        described: dict[str, Any] = {"__metadata__": {"temperature": repr(self.temperature)}}
        end = 0
        for name, dtype, shape in (
            ("begins", torch.int64, (self.rows + 1,)),
            ("log_totals", torch.float32, (places,)),
            ("tokens", torch.int32, (places, self.top_k)),
            ("logits", self.dtype, (places, self.top_k)),
        ):
            begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            described[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(described).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def _begins(rows: Any) -> Tensor:
    """Return where the predicting places of every row begin, and at last where they end."""
    counts = [int((rows[index]["labels"][1:] != -100).sum()) for index in range(len(rows))]
    return torch.tensor([0, *counts]).cumsum(0)


def _reserve(partial: Path, begins: Tensor, layout: _Layout) -> None:
    """Make the file as long as it will be, with nothing in it but where rows begin.

    Raises:
        HealingError: if there is not so much space.
        OSError: if it cannot be written for another reason.
    """
    places = int(begins[-1])
    head = layout.header(places) + _bytes(begins)
    size = len(head) + places * layout.bytes_per_place
    new = partial.with_name(f"{partial.name}.new")
    try:
        with new.open("wb") as out:
            out.write(head)
            out.flush()
            _allocate(out, new, size)
            os.fsync(out.fileno())
        for noted in partial.parent.glob(f"{partial.name}.[0-9]*"):  # of a file that was removed
            noted.unlink()
        new.replace(partial)
    except OSError as error:
        new.unlink(missing_ok=True)
        if error.errno not in FULL:
            raise
        raise HealingError(
            f"{partial.parent}: no space left for the teacher's logits, {size / 2**30:.2f} GiB "
            f"({layout.bytes_per_place} bytes for each of {places:,} tokens). Free as much, take "
            "a smaller top_k than "
            f"{layout.top_k}, or leave store_teacher out."
        ) from error


def _allocate(out: BinaryIO, path: Path, size: int) -> None:
    """Take the space now, so that a full disk is told before hours of work.

    Raises:
        OSError: if there is not so much space.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(out.fileno(), 0, size)
            return
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    # Not all systems can: then at least it is free now.
    if shutil.disk_usage(path.parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    out.truncate(size)


def _read_begins(out: BinaryIO) -> dict[str, Any]:
    """Return where tensors lie in the file, and where rows begin in them."""
    out.seek(0)
    length = int.from_bytes(out.read(8), "little")
    header = json.loads(out.read(length))
    at: dict[str, Any] = {
        name: 8 + length + header[name]["data_offsets"][0]
        for name in ("log_totals", "tokens", "logits")
    }
    data = bytearray(out.read(8 * header["begins"]["shape"][0]))
    at["begins"] = torch.frombuffer(data, dtype=torch.int64).tolist()
    return at


@torch.no_grad()
def _top(
    teacher: Any, batch: dict[str, Tensor], layout: _Layout, *, bf16: bool, position_ids: bool
) -> dict[str, Tensor]:
    """Return what is kept of a batch, its predicting places only."""
    device = teacher.device
    labels_NL = batch.pop("labels")
    if not position_ids:
        batch.pop("position_ids", None)
    inputs = {key: value.to(device) for key, value in batch.items()}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        logits_NLV = teacher(**inputs, use_cache=False).logits
    counted_NL = torch.nn.functional.pad(labels_NL[:, 1:], (0, 1), value=-100) != -100
    places_P = counted_NL.flatten().nonzero().flatten().to(device)
    logits_TV = logits_NLV.flatten(0, 1)
    kept: list[tuple[Tensor, ...]] = [
        (
            torch.empty(0),
            torch.empty(0, layout.top_k, dtype=torch.int32),
            torch.empty(0, layout.top_k, dtype=layout.dtype),
        )
    ]
    for places in places_P.split(max(1, CHUNK_NUMBERS // logits_TV.shape[1])):
        logits_CV = logits_TV[places]
        scaled_CV = logits_CV.float() / layout.temperature
        log_p_CK, tokens_CK = scaled_CV.log_softmax(-1).topk(layout.top_k, dim=-1)
        # Not logsumexp, which rounds otherwise than the log_softmax of a live teacher's loss.
        log_totals_C = scaled_CV.gather(-1, tokens_CK[:, :1])[:, 0] - log_p_CK[:, 0]
        chosen_CK = logits_CV.gather(-1, tokens_CK).to(layout.dtype)
        parts = log_totals_C, tokens_CK.int(), chosen_CK
        kept.append(tuple(part.cpu() for part in parts))
    names = ("log_totals", "tokens", "logits")
    return {
        name: torch.cat(parts) for name, parts in zip(names, zip(*kept, strict=True), strict=True)
    }


def _write(out: BinaryIO, at: dict[str, Any], which: range, found: dict[str, Tensor]) -> None:
    """Put what was found for some rows, one after the other, where it belongs.

    Raises:
        HealingError: if the rows predict another number of tokens than when they were counted.
    """
    begin, end = at["begins"][which[0]], at["begins"][which[-1] + 1]
    for name, tensor in found.items():
        if len(tensor) != end - begin:
            raise HealingError(
                f"heal.store_teacher: rows {which[0]} to {which[-1]} predict {len(tensor)} tokens "
                f"and predicted {end - begin} before; the text has changed. Begin anew "
                "(--overwrite)."
            )
        out.seek(at[name] + begin * tensor[:1].numel() * tensor.element_size())
        out.write(_bytes(tensor))


def _note(out: BinaryIO, noted: Path, done: int) -> None:
    """Note how many rows are done, once they are on disk."""
    out.flush()
    os.fsync(out.fileno())
    new = noted.with_name(f"{noted.name}.new")
    new.write_text(str(done), encoding="utf-8")
    new.replace(noted)


def _bytes(tensor: Tensor) -> bytes:
    # numpy has no bfloat16.
    plain = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return plain.numpy().tobytes()
