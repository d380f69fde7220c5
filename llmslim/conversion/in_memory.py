"""Convert a model that is loaded as a whole: GGUF, text of the model's own, remote code."""

from __future__ import annotations

from dataclasses import replace

from llmslim import surgery
from llmslim.checkpoint import (
    blamed_on,
    check_finite,
    load_model,
    load_tokenizer,
    told_of_types,
    write_checkpoint,
)
from llmslim.modeling.base_class import auto_class_name
from llmslim.modeling.modeling_llmslim import SlimModelMixin
from llmslim.recipe import recipe_yaml
from llmslim.reporting.card import model_card

from .calibrate import read_text, token_ids, told_of_overflow
from .options import Conversion, Job


def convert_in_memory(job: Job, notes: tuple[str, ...] = ()) -> Conversion:
    """Load, rewrite, write and read back.

    Args:
        job: what to do.
        notes: sentences for the report.
    """
    source, chosen, tell = job.source, job.recipe, job.tell
    tell(0, 0, "reading the model")
    loaded = load_model(source, dtype=job.dtype, trust_remote_code=job.trust_remote_code)
    weights = loaded.state_dict().items()
    nonfinite = check_finite(weights, source.given, allow_nonfinite=job.allow_nonfinite)
    made = surgery.plan(loaded, chosen, model_name=source.name, init=job.init)
    tokenizer = load_tokenizer(source, trust_remote_code=job.trust_remote_code)
    if made.needs_calibration:
        loaded.to(job.device)  # type: ignore[arg-type]
    windows = read_text(job, tokenizer, loaded) if made.needs_calibration else None
    overflow = () if nonfinite else told_of_overflow(loaded, windows, source.given)
    ids = token_ids(windows)
    if ids is not None and chosen.has_auto:
        chosen = surgery.allocate(loaded, chosen, ids, init=job.init, progress=tell)
        made = surgery.plan(loaded, chosen, model_name=source.name, init=job.init)
    steps = 0

    def fitting(done: int, total: int, what: str) -> None:
        nonlocal steps
        steps = total
        tell(done, total + 1, what)

    with blamed_on(nonfinite):
        report = surgery.rewrite(loaded, made, seed=job.seed, calibration=ids, progress=fitting)
    loaded.to("cpu")  # type: ignore[arg-type]
    written = told_of_types(source, loaded.dtype, job.dtype)
    notes = (*nonfinite, *overflow, *(() if windows is None else windows.notes), *written, *notes)
    report = replace(
        report,
        problems=(*report.problems, *notes),
        fitted_to="" if windows is None else windows.description,
    )
    tell(steps, steps + 1, "writing and reading back")
    write_checkpoint(
        loaded,
        job.target,
        source=source,
        tokenizer=tokenizer,
        report=report.to_dict(),
        recipe_text=recipe_yaml(chosen),
        model_card=model_card(
            report,
            recipe_text=recipe_yaml(chosen),
            base_model=source.given,
            slim=isinstance(loaded, SlimModelMixin),
            auto_class=auto_class_name(loaded.config),
        ),
        max_shard_size=job.max_shard_size,
        overwrite=job.overwrite,
    )
    tell(steps + 1, steps + 1, "done")
    return Conversion(job.target, report, auto_class_name(job.source.config))
