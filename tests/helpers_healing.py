"""What the healing tests share: text that a tiny model can learn, and one short call to heal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model
from torch import Tensor
from torch.utils.data import Dataset

from llmslim import slim
from llmslim.healing import HealingDir, HealInputs, HealReport, heal_model
from llmslim.recipe import Heal

LENGTH = 16


class Rows(Dataset[dict[str, Tensor]]):
    """Rows that count upwards in steps of 3 from a random token on; two samples in each."""

    def __init__(self, count: int, seed: int, step: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(1, 90, (count, 2, 1), generator=generator)
        self.ids = ((first + torch.arange(LENGTH // 2) * step) % 95 + 1).reshape(count, LENGTH)
        self.tokens = self.ids.numel()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        positions = torch.arange(LENGTH) % (LENGTH // 2)
        labels = self.ids[index].masked_fill(positions == 0, -100)
        return {"input_ids": self.ids[index], "labels": labels, "position_ids": positions}


@dataclass
class Text:
    """Rows to train on and rows held out."""

    train: Rows
    held_out: Rows
    source: str = "counting"
    licence: str = "CC0-1.0"
    notes: tuple[str, ...] = ()
    padding: float = 0.0


def text(train: int = 16, held_out: int = 4, **options: Any) -> Text:
    return Text(Rows(train, 1, **options), Rows(held_out, 2))


def slimmed(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """Return a model with low-rank MLPs."""
    model = tiny_model(architecture)
    slim(model, {"replace": [{"match": "*.mlp.*", "structure": "low_rank", "rank": 8}]})
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def healed(model: Any, folder: Path, rows: Text | None = None, **options: Any) -> HealReport:
    """Heal in place; fields of `HealInputs` by their names, all others go into the spec."""
    passed = {
        key: options.pop(key) for key in ("teacher", "narrowed", "tokenizer") if key in options
    }
    resume, progress = options.pop("resume", False), options.pop("progress", None)
    rows = options.pop("rows", rows) or text()
    settings = {"batch_size": 4, "micro_batch": 4, "learning_rate": 1e-2, "warmup": 0.0}
    settings |= {"precision": "fp32", **options}  # also in programs of their own
    inputs = HealInputs(model, Heal(**settings), rows, **passed)
    with HealingDir(folder, resume=resume) as run:
        return heal_model(inputs, run, progress=progress)


def independent_loss(model: Any, rows: Rows) -> float:
    """Return the held-out loss as transformers counts it, one sample at a time, unpacked."""
    total, count = 0.0, 0
    half = LENGTH // 2
    for index in range(len(rows)):
        for ids in rows[index]["input_ids"].reshape(2, half):
            with torch.no_grad():
                loss = model(ids[None], labels=ids[None]).loss
            total, count = total + float(loss) * (half - 1), count + half - 1
    return total / count


def losses(report: HealReport) -> list[float]:
    return [line["loss"] for line in report.history if "loss" in line]
