"""Tasks of EleutherAI's lm-evaluation-harness (`lm_eval`), on a model in memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmslim.errors import DataError
from llmslim.report.scores import TaskScore


def check_tasks(tasks: Iterable[str]) -> None:
    """Refuse tasks where the harness is not installed, or a file of one is not there.

    Raises:
        DataError: if so.
    """
    names = list(tasks)
    if names and importlib.util.find_spec("lm_eval") is None:
        raise DataError(
            "tasks: lm-evaluation-harness is not installed. Install it with "
            "`pip install 'llmslim-toolkit[eval]'`."
        )
    for name in names:
        if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
            raise DataError(f"tasks: {name}: no such file. Give a task's name, or its YAML file.")


def score_task(
    model: Any, tokenizer: Any, task: str, *, limit: int | None = None, batch_size: int = 8
) -> list[TaskScore]:
    """Run one task; return its metrics.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        task: the name of one of the harness's tasks, or a YAML file with one's config.
        limit: rows to try, the first ones; all by default.
        batch_size: rows run together.

    Raises:
        DataError: if there is no such task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import load_yaml_config

    is_file = task.endswith((".yaml", ".yml"))
    wanted: Any = load_yaml_config(task) if is_file else task
    manager = TaskManager(include_defaults=not is_file)
    if not is_file and task not in manager.all_tasks:
        raise DataError(
            f"tasks: {task!r}; lm-evaluation-harness has none of that name. See `lm_eval ls tasks`."
        )
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=[wanted],
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
        task_manager=manager,
    )
    assert found is not None  # only processes other than the first get None
    rows = found.get("n-samples", {})
    return [
        TaskScore(
            name,
            key.removesuffix(",none"),
            float(value),
            _number(metrics.get(key.replace(",", "_stderr,", 1))),
            rows.get(name, {}).get("effective"),
        )
        for name, metrics in found["results"].items()
        for key, value in metrics.items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    ]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
