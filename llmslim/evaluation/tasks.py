"""Tasks of EleutherAI's lm-evaluation-harness (`lm_eval`), on a model in memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from llmslim.errors import DataError
from llmslim.report.scores import TaskScore
from llmslim.storage import first_line


def check_tasks(tasks: Iterable[str]) -> None:
    """Refuse tasks where the harness is not installed, or a file of one does not hold it.

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
        if _is_file(name):
            _read_task(Path(name))


def score_task(
    model: Any, tokenizer: Any, task: str, *, limit: int | None = None, batch_size: int = 8
) -> list[TaskScore]:
    """Run one task; return its metrics.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        task: the name of one of the harness's tasks, or a YAML file with one's config, all of it
            in that file and none of it code.
        limit: rows to try, the first ones; all by default.
        batch_size: rows run together.

    Raises:
        DataError: if there is no such task, or the file holds none.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    is_file = _is_file(task)
    wanted: Any = _read_task(Path(task)) if is_file else task
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


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _read_task(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"tasks: {path}: no such file. Give a task's name, or its YAML file.")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        # The harness would run the code that a tag `!function` names.
        raise DataError(
            f"tasks: {path}: {first_line(error)}. Give a task without code of its own."
        ) from error
    if not isinstance(config, dict) or "include" in config:
        raise DataError(f"tasks: {path}: not one whole task. Give a file with all keys of one.")
    return config
