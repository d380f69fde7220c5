"""The public verbs, from `plan` to `verify`.

Each is a few calls into the layers below and prints nothing. `convert` is defined with the rest of
`llmslim.conversion`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedModel

from llmslim import planning
from llmslim.conversion.calibrate import calibration_spec
from llmslim.conversion.convert import convert, slim_with
from llmslim.conversion.request import Conversion
from llmslim.data import Windows, calibration_windows, check_ids, embedding_rows
from llmslim.editing.plans import Plan
from llmslim.errors import CheckpointError, DataError, UnfinishedError
from llmslim.export.verbs import export_dense, export_gguf, export_onnx, push
from llmslim.options import BenchOptions, EvalOptions, HealOptions, RecipeLike, takes
from llmslim.progress import Progress, quietly
from llmslim.recipe import Recipe
from llmslim.report.report import Report
from llmslim.storage import (
    Verification,
    check_keeps_source,
    check_target,
    empty_model,
    load_finite,
    open_source,
    verify_folder,
    write_checkpoint,
)

if TYPE_CHECKING:  # import the Trainer or scipy's distributions, which few verbs need
    from llmslim.evaluation import Evaluation
    from llmslim.healing import HealReport
    from llmslim.healing.plan import HealingPlan
    from llmslim.report.speeds import Benchmark


def plan(
    model: PreTrainedModel | PreTrainedConfig | str | Path,
    recipe: RecipeLike,
    *,
    init: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Work out what a recipe makes of a model, without touching or loading a weight.

    Args:
        model: a model, its config, a hub id, a folder (config.json alone is enough) or a GGUF file.
        recipe: what to do.
        init: method of fitting, in place of the recipe's.
        trust_remote_code: run the modeling code that comes with the model.

    Raises:
        SlimError: with every problem found.
    """
    recipe = Recipe.of(recipe)
    if isinstance(model, str | Path):
        source = open_source(model, trust_remote_code=trust_remote_code, weights=False)
        empty = empty_model(source.config, source.given, trust_remote_code=trust_remote_code)
        return planning.plan(empty, recipe, model_name=source.name, init=init)
    config = getattr(model, "config", model)
    return planning.plan(model, recipe, model_name=config.name_or_path or "", init=init)


def slim(
    model: PreTrainedModel,
    recipe: RecipeLike,
    *,
    init: str | None = None,
    seed: int = 0,
    calibration: Windows | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Report:
    """Change a model according to a recipe, in place.

    The model stays a subclass of its class; `model.save_pretrained(path)` then writes a slim
    checkpoint that `AutoModelForCausalLM.from_pretrained` loads back.

    Args:
        model: a transformers causal language model.
        recipe: what to do.
        init: method of fitting, in place of the recipe's.
        seed: of all random numbers.
        calibration: token windows for methods that fit to activations, from
            `llmslim.data.calibration_windows`; by default the text of the recipe's section
            `calibration`, or without that section, text that the model writes.
        tokenizer: the model's, to read the recipe's calibration text.
        progress: called with the number of blocks done, their total, and what comes next.

    Returns:
        The report: a row for every module that owns parameters.

    Raises:
        SlimError: with every problem found; the model is then unchanged.
        DataError: if `calibration` is not windows, or has tokens that the model does not know.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes))
        >>> rule = {"match": "*.mlp.*", "structure": "low_rank", "rank": 4}
        >>> slim(model, {"replace": [rule]}).totals.non_embedding_after
        10656
    """
    recipe = Recipe.of(recipe)
    made = plan(model, recipe, init=init)
    if calibration is None and made.needs_calibration:
        spec = calibration_spec(recipe, model)
        calibration = calibration_windows(spec, tokenizer, model, progress=progress)
    elif calibration is not None:
        if not isinstance(calibration, Windows):
            raise DataError(
                f"calibration: {type(calibration).__name__}; token windows are needed. Make them "
                "with llmslim.data.calibration_windows."
            )
        for ids in (calibration.ids, calibration.held_out):
            known = embedding_rows(model)
            check_ids(ids.flatten().cpu().numpy(), tokenizer, known, "calibration")
    report, _ = slim_with(model, made, calibration, seed=seed, init=init, progress=progress)
    return report


def load(
    path: str | Path, *, dtype: str | None = None, allow_nonfinite: bool = False
) -> PreTrainedModel:
    """Load a slim or dense model on the CPU, in evaluation mode.

    Args:
        path: folder, hub id or GGUF file; what `convert` or `save` wrote, or any other causal
            language model.
        dtype: of the weights; as stored by default.
        allow_nonfinite: accept weights that are NaN or infinite.

    Raises:
        CheckpointError: if it is missing, incomplete, or has such weights.
    """
    return load_finite(open_source(path), dtype=dtype, allow_nonfinite=allow_nonfinite)


def save(
    model: PreTrainedModel,
    path: str | Path,
    *,
    tokenizer: Any = None,
    report: Report | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model to a folder that appears only when it is complete.

    Args:
        model: slim or dense.
        path: folder to write; must not exist, unless `overwrite`.
        tokenizer: saved beside the model.
        report: what `slim` returned, for `llmslim report`.
        overwrite: replace an existing folder once the new one is complete.

    Raises:
        CheckpointError: if it cannot be written; `path` is then unchanged.
    """
    data = None if report is None else report.to_dict()
    return write_checkpoint(
        model, Path(path), tokenizer=tokenizer, report=data, overwrite=overwrite
    )


@takes(HealOptions)
def heal(model: PreTrainedModel | str | Path, options: HealOptions) -> HealReport:
    """Train a slim model to recover its quality.

    A checkpoint is written to a new folder; a model in memory is changed in place, and written
    only where `out` is given. Until the new folder is complete, `<out>.healing` holds what is
    needed to continue after a kill.

    Args:
        model: what `convert` wrote, any other causal language model, or a model in memory.
        options: the fields of `HealOptions`, given as keywords; `out` may come second.

    Raises:
        HealingError: if the training cannot begin or continue.
        UnfinishedError: if the disk is full, or `out` cannot be written; the training is kept.
        SlimError: if model, recipe or data are wrong; `out` is then unchanged.

    Example:
        >>> heal("slim", "healed", teacher="dense", tokens=1_000_000)  # doctest: +SKIP
    """
    from llmslim.conversion.healed import write_healed
    from llmslim.healing import HealingDir, folder_beside, heal_model, load_inputs
    from llmslim.healing.distributed import processes
    from llmslim.healing.restoring import as_it_was

    state, target = processes(), _healing_target(model, options)
    progress = (options.progress if state.is_main_process else None) or quietly
    with ExitStack() as stack:
        # `load_inputs` may change models: it samples text from a teacher, and chooses attention.
        stack.enter_context(as_it_was(model))
        stack.enter_context(as_it_was(options.teacher, weights=True))
        inputs = load_inputs(model, options, progress)
        if target is None:
            temporary = stack.enter_context(TemporaryDirectory(prefix="llmslim-"))
            path = Path(temporary) / "run"
        else:
            path = folder_beside(target)
        folder = stack.enter_context(
            HealingDir(path, resume=options.resume, overwrite=options.overwrite)
        )
        report = heal_model(inputs, folder, progress=progress)
        if target is None:
            return report
        report = replace(report, path=target)
        if state.is_main_process:
            progress(0, 0, "writing and reading back")
            try:
                write_healed(inputs, report, target, overwrite=options.overwrite)
            except CheckpointError as error:
                raise UnfinishedError(
                    f"{error} The trained weights are kept in {path}. Resume (--resume) to write "
                    "them again."
                ) from error
            folder.remove()
        state.wait_for_everyone()
        return report


@takes(HealOptions)
def plan_heal(model: str | Path, options: HealOptions) -> HealingPlan:
    """Work out what `heal` would do with the same arguments, and check the arguments.

    Text is read and tokenised, which fills its cache; nothing is trained or written.

    Args:
        model: as for `heal`.
        options: as for `heal`.

    Returns:
        What would be trained on which text, for how many steps, and the memory that it takes.

    Raises:
        SlimError: if model, recipe, data or folders are wrong.
    """
    from llmslim.healing import HealingDir, folder_beside, load_inputs
    from llmslim.healing.plan import plan_healing

    target = _healing_target(model, options)
    inputs = load_inputs(model, options, options.progress or quietly)
    if target is not None:
        path = folder_beside(target)
        HealingDir(path, resume=options.resume, overwrite=options.overwrite).check_free()
    return plan_healing(inputs)


def _healing_target(model: PreTrainedModel | str | Path, options: HealOptions) -> Path | None:
    """Return the folder that healing will write, once checked; None for a model in memory."""
    out = options.out
    if out is None and isinstance(model, str | Path):
        out = f"{Path(model).expanduser().resolve().name}-healed"
    if out is None:
        return None
    target = Path(out).absolute()
    check_target(target, options.overwrite)
    if isinstance(model, str | Path) and Path(model).is_dir():
        check_keeps_source(target, Path(model), str(model), same=True)
    return target


@takes(EvalOptions)
def evaluate(model: PreTrainedModel | str | Path, options: EvalOptions) -> Evaluation:
    """Score a model on text and on tasks, beside the dense model if that is given.

    Args:
        model: slim or dense: a hub id, a folder, a GGUF file, or a model in memory, of which only
            the device changes.
        options: the fields of `EvalOptions`, given as keywords.

    Returns:
        The scores; of a checkpoint that llmslim wrote, also those of earlier evaluations.

    Raises:
        DataError: if there is nothing to score on, a text cannot be used, or there is no such task.
        SlimError: if a model cannot be loaded.

    Example:
        >>> evaluate("slim", "dense", text="test.txt").texts[0].perplexity  # doctest: +SKIP
    """
    from llmslim.evaluation.run import evaluate_model

    return evaluate_model(model, options)


@takes(BenchOptions)
def bench(model: PreTrainedModel | str | Path, options: BenchOptions) -> Benchmark:
    """Measure how fast a model generates, beside the dense model if that is given.

    Args:
        model: slim or dense: a hub id, a folder, a GGUF file, or a model in memory, of which only
            the device changes.
        options: the fields of `BenchOptions`, given as keywords.

    Returns:
        Tokens per second, seconds to the first token and bytes, for each number of rows.

    Raises:
        DataError: if a number is wrong, or longer than what a model can read.
        SlimError: if a model cannot be loaded.

    Example:
        >>> bench("slim", "dense", batch=1).speeds[0].decode  # doctest: +SKIP
    """
    from llmslim.evaluation.speed import benchmark_model

    return benchmark_model(model, options)


def verify(path: str | Path) -> Verification:
    """Compare a checkpoint with its manifest: missing, added and changed files.

    Args:
        path: what `convert` or `save` wrote.

    Raises:
        CheckpointError: if it has no manifest.
    """
    return verify_folder(Path(path))


__all__ = [
    "Conversion",
    "bench",
    "convert",
    "evaluate",
    "export_dense",
    "export_gguf",
    "export_onnx",
    "heal",
    "load",
    "plan",
    "plan_heal",
    "push",
    "save",
    "slim",
    "verify",
]
