"""The teacher's likeliest tokens for every row, computed once and kept in a file.

    teacher_logits.safetensors
        begins      (R + 1,)  int64    where each row's tokens begin
        log_totals  (P,)      float32  log of the sum of exp(logit / T) over the vocabulary
        tokens      (P, K)    int32    the likeliest tokens
        logits      (P, K)    bfloat16 where the arithmetic is, else float32

Only places that predict something are kept, in the order of rows and places, so the file does not
depend on how rows are put together later. Logits are kept in the type that the teacher computes
them in: nothing is lost, and a loss is that of the teacher itself with as large a `top_k`.

`storing.py` writes it; here it is read.

Shapes: R = rows, P = places that predict, K = top_k, V = vocabulary, N = rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from llmslim.errors import HealingError
from llmslim.healing.measure import Collate
from llmslim.healing.objectives import Taught
from llmslim.healing.rows import tokens_in

FILE = "teacher_logits.safetensors"


class Numbered(Dataset[dict[str, Tensor]]):
    """Rows that say which they are.

    Args:
        rows: a map-style data set.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**self.rows[index], "row": torch.tensor(index)}

    def tokens_in(self, index: int) -> int:
        """Return the tokens of one row, without padding."""
        return tokens_in(self.rows, index)


def numbered(collate: Collate) -> Collate:
    """Return what puts rows together, and lists as `rows` and `tokens` what they say of themselves.

    That is which they are, and how many tokens are in them.
    """

    def both(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        joined = collate([{k: row[k] for k in row if k not in ("row", "tokens")} for row in batch])
        for key, name in (("row", "rows"), ("tokens", "tokens")):
            said = [row[key] for row in batch if key in row]
            if said:
                joined[name] = torch.stack(said)
        return joined

    return both


class StoredLogits:
    """A whole file, mapped into memory: what is read of it is what a batch needs.

    Args:
        file: what `storing.store` wrote.

    Raises:
        HealingError: if it cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            opened: Any = safe_open(file, framework="pt")
            self._begins = opened.get_tensor("begins").tolist()
            self._temperature = float(opened.metadata()["temperature"])
            self._parts = [opened.get_slice(name) for name in ("logits", "tokens", "log_totals")]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise HealingError(
                f"{file}: cannot be read ({error}); it must be as it was written. Remove it and "
                "resume (--resume): it is then computed anew."
            ) from error

    def of(self, rows: Sequence[int], device: torch.device | str = "cpu") -> Taught:
        """Return what the teacher says at the places of some rows that predict something.

        Args:
            rows: which, in the order of the batch.
            device: where it is to be.
        """
        ranges = [(self._begins[row], self._begins[row + 1]) for row in rows]
        # A range of nothing is none that safetensors can cut.
        ranges = [(begin, end) for begin, end in ranges if end > begin]
        if not ranges:
            nothing = torch.empty(0, 1, device=device)
            return Taught(nothing, nothing.long())
        logits_PK, tokens_PK, log_totals_P = (
            torch.cat([part[begin:end] for begin, end in ranges]).to(device) for part in self._parts
        )
        log_p_PK = logits_PK.float() / self._temperature - log_totals_P[:, None]
        return Taught(log_p_PK, tokens_PK.long())
