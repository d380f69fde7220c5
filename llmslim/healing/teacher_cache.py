"""The teacher's likeliest tokens for every row, computed once and stored in files.

    teacher/00000.safetensors      of the first `SHARD_ROWS` rows, and so on
        begins      (R + 1,)  int64    where each row's tokens begin
        log_totals  (P,)      float32  log of the sum of exp(logit / T) over the vocabulary
        tokens      (P, K)    int32    the likeliest tokens
        logits      (P, K)    bfloat16 where the arithmetic is, else float32

Only places that predict a token are kept, in the order of rows and places, so a file does not
depend on later batches. Logits are kept in the type in which the teacher computes them: the loss
is exactly that of a live teacher with the same `top_k`.

A file appears when it is complete, and its metadata has the key of the run: a resumed run keeps its
files, and computes those that are missing or have another key.

Shapes: R = rows of a file, P = places that predict, K = top_k, V = vocabulary, N = rows of a batch,
L = tokens of a row, T = all tokens of a batch, C = tokens of a chunk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmslim.anatomy.predictions import tokens_at_once
from llmslim.errors import HealingError
from llmslim.healing.objectives import TeacherTopK, next_tokens
from llmslim.healing.rows import Collate
from llmslim.progress import Progress
from llmslim.report import wording
from llmslim.storage import replacing

TOP_K = 64
"""Tokens kept for each place, unless the recipe sets `top_k`."""
SHARD_ROWS = 32
"""Rows in one file; a resumed run computes an unfinished file again."""
_PARTS = ("logits", "tokens", "log_totals")


@dataclass(frozen=True)
class TeacherCache:
    """Files with a teacher's predictions for some rows."""

    folder: Path
    key: str
    """What the files depend on; files with another key count as missing."""
    top_k: int
    """Tokens kept for each place, at most the vocabulary."""
    temperature: float
    """Divides the logits."""
    bf16: bool
    """Whether the arithmetic is bfloat16."""

    def topk_of(self, rows: Sequence[int], device: torch.device | str = "cpu") -> TeacherTopK:
        """Return the teacher's predictions for some rows.

        Args:
            rows: their indices, in the order of the batch.
            device: of the result.
        """
        found: list[list[Tensor]] = []
        for row in rows:
            shard, at = divmod(row, SHARD_ROWS)
            opened: Any = safe_open(self._file(shard), framework="pt")
            begin, end = opened.get_tensor("begins")[at : at + 2].tolist()
            if end > begin:  # safetensors has no empty slices
                found.append([opened.get_slice(name)[begin:end] for name in _PARTS])
        if not found:
            nothing = torch.empty(0, 1, device=device)
            return TeacherTopK(nothing, nothing.long())
        logits_PK, tokens_PK, log_totals_P = (
            torch.cat(parts).to(device) for parts in zip(*found, strict=True)
        )
        log_p_PK = logits_PK.float() / self.temperature - log_totals_P[:, None]
        return TeacherTopK(log_p_PK, tokens_PK.long())

    def fill(
        self,
        load: Callable[[], Any],
        rows: Any,
        collate: Collate,
        *,
        micro_batch: int,
        state: PartialState,
        progress: Progress,
    ) -> None:
        """Compute the missing files, each process its share of them.

        Args:
            load: returns the teacher on the device; only called where files are missing.
            rows: its input; files identify rows by their index.
            collate: makes a batch of some rows.
            micro_batch: rows of one call.
            state: accelerate's.
            progress: called with the number of rows done.

        Raises:
            HealingError: if the disk has no space for the files.
        """
        shards = [
            range(begin, min(begin + SHARD_ROWS, len(rows)))
            for begin in range(0, len(rows), SHARD_ROWS)
        ]
        missing = [number for number in range(len(shards)) if not self._is_whole(number)]
        if state.is_main_process and missing:
            self.folder.mkdir(exist_ok=True)
            self._check_space(sum(int(_begins(rows, shards[n])[-1]) for n in missing))
        state.wait_for_everyone()  # before one writes what the others check
        mine = [number for number in missing if number % state.num_processes == state.process_index]
        teacher = load() if mine else None
        for number in mine:
            shard, found = shards[number], []
            for begin in range(0, len(shard), micro_batch):
                progress(shard[begin], len(rows), "storing the teacher's logits")
                batch = collate([rows[index] for index in shard[begin : begin + micro_batch]])
                found.append(self._predict(teacher, batch))
            columns = zip(_PARTS, zip(*found, strict=True), strict=True)
            parts = {name: torch.cat(pieces) for name, pieces in columns}
            with replacing(self._file(number)) as partial:
                save_file({"begins": _begins(rows, shard), **parts}, partial, {"key": self.key})
        state.wait_for_everyone()

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05}.safetensors"

    def _is_whole(self, number: int) -> bool:
        try:
            with safe_open(self._file(number), framework="pt") as opened:
                return bool(opened.metadata() == {"key": self.key})
        except (OSError, SafetensorError):
            return False

    def _check_space(self, places: int) -> None:
        """Refuse, before hours of work, a disk without space for the files.

        Raises:
            HealingError: if there is none for this number of places.
        """
        each = 4 + self.top_k * (6 if self.bf16 else 8)
        if shutil.disk_usage(self.folder).free < places * each:
            raise HealingError(
                f"{self.folder}: no space left for the teacher's logits, which take "
                f"{wording.size(places * each)} ({each} bytes for each of {places:,} tokens). Free "
                f"some space, set top_k below {self.top_k}, or leave store_teacher out."
            )

    @torch.no_grad()
    def _predict(self, teacher: Any, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return logits, tokens and log totals of a batch, in main memory, as in a file."""
        device = teacher.device
        labels_NL = batch.pop("labels")
        inputs = {key: value.to(device) for key, value in batch.items()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            logits_TV = teacher(**inputs, use_cache=False).logits.flatten(0, 1)
        predicts_NL = next_tokens(labels_NL) != -100
        places_P = predicts_NL.flatten().nonzero().flatten().to(device)
        top_k = min(self.top_k, logits_TV.shape[1])
        kept: list[tuple[Tensor, ...]] = []
        for places in places_P.split(tokens_at_once(logits_TV)):
            logits_CV = logits_TV[places]
            scaled_CV = logits_CV.float() / self.temperature
            log_p_CK, tokens_CK = scaled_CV.log_softmax(-1).topk(top_k, dim=-1)
            # Not logsumexp, which rounds differently from the log_softmax of a live teacher's loss.
            log_totals_C = scaled_CV.gather(-1, tokens_CK[:, :1])[:, 0] - log_p_CK[:, 0]
            logits_CK = logits_CV.gather(-1, tokens_CK)
            logits_CK = logits_CK.to(torch.bfloat16 if self.bf16 else torch.float32)
            kept.append((logits_CK.cpu(), tokens_CK.int().cpu(), log_totals_C.cpu()))
        return tuple(torch.cat(one) for one in zip(*kept, strict=True))


def _begins(rows: Any, which: range) -> Tensor:
    """Return where each row's predicting places begin, and where the last ones end."""
    counts = [int((rows[index]["labels"][1:] != -100).sum()) for index in which]
    return torch.tensor([0, *counts]).cumsum(0)
