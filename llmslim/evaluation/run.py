"""Evaluate a model: find and load it and the dense one, score, and keep the scores."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from transformers import PreTrainedModel

from llmslim.data import first_windows
from llmslim.errors import CheckpointError, DataError
from llmslim.evaluation.opening import folder_of, library_versions, opened
from llmslim.evaluation.tasks import check_tasks, score_task
from llmslim.evaluation.texts import score_text
from llmslim.options import EvalOptions
from llmslim.progress import quietly
from llmslim.report.scores import (
    Evaluation,
    TaskScore,
    TextScores,
    keep_evaluation,
    read_evaluation,
)


def evaluate_model(model: PreTrainedModel | str | Path, options: EvalOptions) -> Evaluation:
    """Score a model; arguments and result as of `llmslim.evaluate`.

    Raises:
        DataError: if there is nothing to score on, or a number is wrong.
        CheckpointError: if the model has no tokenizer.
    """
    texts, tasks = _names(options.text), _names(options.tasks)
    if not texts and not tasks:
        raise DataError("evaluate: nothing to score on; give a text (--text) or a task (--tasks).")
    for name, value in (("windows", options.windows), ("limit", options.limit)):
        if value is not None and value < 1:
            raise DataError(f"{name}: {value}; at least 1 is needed.")
    check_tasks(tasks)
    progress = options.progress or quietly
    folder = folder_of(model) if options.store else None
    known = None if folder is None or not options.resume else read_evaluation(folder)
    progress(0, 0, "reading the model")
    loaded, name, tokenizer = opened(model, options)
    if tokenizer is None:
        raise CheckpointError(f"{name}: has no tokenizer to read text with. Add its files.")
    dense, against = None, ""
    if options.against is not None and texts:
        dense, against, _ = opened(options.against, options)
    whole = known or Evaluation(name)

    def add(texts: tuple[TextScores, ...] = (), tasks: tuple[TaskScore, ...] = ()) -> None:
        nonlocal whole
        found = Evaluation(name, against, texts, tasks, library_versions())
        whole = whole.merged(found) if folder is None else keep_evaluation(folder, found)

    with ExitStack() as stack:
        for one in (loaded, *(() if dense is None else (dense,))):
            stack.callback(one.train, one.training)
            one.eval()
        for text in texts:
            shown, ids_NL = first_windows(text, options.windows, options.length, tokenizer, loaded)
            if known is not None and any(
                (one.text, one.length, one.windows) == (shown, options.length, len(ids_NL))
                and (dense is None or one.divergence is not None)
                for one in known.texts
            ):
                continue
            add(texts=(score_text(loaded, ids_NL, name=shown, dense=dense, progress=progress),))
        for number, task in enumerate(tasks):
            progress(number, len(tasks), task)
            if known is not None and any(one.task == Path(task).stem for one in known.tasks):
                continue
            add(tasks=tuple(score_task(loaded, tokenizer, task, limit=options.limit)))
    return whole


def _names(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)
