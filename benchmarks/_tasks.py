"""Zero-shot accuracy on local Parquet files, by EleutherAI's lm-evaluation-harness (`lm_eval`).

The questions are put as the harness's own tasks `piqa` and `blimp` put them; only the rows come
from a file, and nothing is downloaded. BLiMP's 67 paradigms are one task here: each has as many
rows, so the mean over rows is the mean over paradigms.
"""

from __future__ import annotations

import importlib.util
import io
import logging
from collections.abc import Mapping
from contextlib import redirect_stderr
from typing import Any

import click
import pyarrow.parquet

TASKS: dict[str, dict[str, Any]] = {
    "piqa": {
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
    },
    "blimp": {
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
    },
}


def check_tasks(tasks: tuple[str, ...], files: Mapping[str, str | None]) -> dict[str, str]:
    """Return the file of each task.

    Raises:
        UsageError: if one has none, or the harness is not installed.
    """
    for name in tasks:
        if files[name] is None:
            raise click.UsageError(f"--tasks {name}: no rows. Give their file: --{name} FILE.")
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise click.UsageError(
            "--tasks: lm-evaluation-harness is not installed. Run `pip install lm_eval`."
        )
    return {name: str(files[name]) for name in tasks}


def spread(rows: int, limit: int | None) -> list[int]:
    """Return the indices of at most `limit` rows, evenly spread: files may be sorted.

    Example:
        >>> spread(10, 4)
        [0, 2, 5, 7]
    """
    count = rows if limit is None else min(limit, rows)
    return [index * rows // count for index in range(count)]


def accuracies(
    model: Any, tokenizer: Any, files: Mapping[str, str], limit: int | None
) -> dict[str, float]:
    """Return the accuracy on each task, between 0 and 1.

    Args:
        model: a causal language model in memory.
        tokenizer: its tokenizer.
        files: Parquet file of each task.
        limit: rows of each; None for all.
    """
    if not files:
        return {}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    configs, samples = [], {}
    for name, path in files.items():
        configs.append(
            {
                "task": f"{name}_local",
                "dataset_path": "parquet",
                "dataset_kwargs": {"data_files": {"validation": path}},
                "validation_split": "validation",
                "output_type": "multiple_choice",
                "num_fewshot": 0,
                "metric_list": [{"metric": "acc"}],
                **TASKS[name],
            }
        )
        rows = pyarrow.parquet.ParquetFile(path).metadata.num_rows
        samples[f"{name}_local"] = spread(rows, limit)
    with redirect_stderr(io.StringIO()):  # progress bars, between the rows of the table
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
            tasks=configs,
            samples=samples,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=TaskManager(include_defaults=False),
        )
    assert found is not None  # only processes other than the first get None
    return {name: found["results"][f"{name}_local"]["acc,none"] for name in files}
