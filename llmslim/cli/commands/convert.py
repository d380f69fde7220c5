"""`llmslim convert`: make a model smaller and write it."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmslim.cli.healing import as_data, heal_and_show
from llmslim.cli.options import options_from
from llmslim.cli.output import (
    json_option,
    out_argument,
    progress,
    show_cost,
    show_report,
    shows,
    write_json,
)
from llmslim.cli.settings import backend, settings
from llmslim.options import ConvertOptions

if TYPE_CHECKING:
    from llmslim.healing import HealReport
    from llmslim.recipe import Recipe
    from llmslim.report.report import Report

_NEXT = """
wrote {path}

what next
  llmslim generate {quoted} "What is the capital of France?"
  llmslim report {quoted} --full
  python: import llmslim; from transformers import {auto}
          model = {auto}.from_pretrained({path!r})
"""
_HONEST = """\
The model has not been healed (fine-tuned): expect it to be worse than its base model until it is
(`llmslim heal`)."""


@click.command()
@click.argument("model")
@options_from(ConvertOptions)
@click.option(
    "--heal",
    is_flag=True,
    help="Also train the result, with the recipe's `heal` section and MODEL as the teacher, if it "
    "has weights, and write that to FOLDER-healed. With --resume, a finished FOLDER is only "
    "healed.",
)
@json_option
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of MODEL on the hub.")
@click.option(
    "--push", metavar="OWNER/NAME", help="Then upload the result, as `llmslim push` does."
)
@click.option("--dry-run", is_flag=True, help="Only show the plan, as `llmslim plan` does.")
@out_argument
def command(
    model: str,
    heal: bool,
    revision: str | None,
    push: str | None,
    dry_run: bool,
    json_target: str | None,
    **keywords: Any,
) -> None:
    """Make MODEL smaller, and write it to a folder.

    MODEL is a hub id, a folder, or a .gguf file. A folder with a published kphi-3 model needs no
    recipe: it is converted to the slim format unchanged. The output folder appears only when it is
    complete.

    Safetensors are read, fitted and written one decoder layer at a time, so memory need not hold
    more than that; only text that the model writes itself, `structure: auto` and training end to
    end take the whole model for a while. A run that was killed or stopped by a full disk (exit
    status 75) continues with --resume. GGUF files are converted in memory and start over.

    A folder with config.json and a tokenizer but no weights becomes a model with random ones, to be
    trained from scratch, with --init random.
    """
    from llmslim.recipe import Recipe, shipped_recipes

    model = model if revision is None else f"{model}@{revision}"
    # Errors in a recipe appear before the slow import of torch.
    recipe = None if keywords["recipe"] is None else Recipe.load(keywords["recipe"])
    if recipe is None and not _is_kphi3(model):
        raise click.UsageError(
            f"Missing option '--recipe'; a file, or one of {', '.join(shipped_recipes())}."
        )
    options = ConvertOptions(**{**keywords, "recipe": recipe})
    if dry_run:
        _show_plan(model, recipe or Recipe(name="kphi3"), options, json_target)
        return
    if push is not None:
        from llmslim.export import check_repo

        check_repo(push)  # before hours of work
    healed = None
    if heal:
        report, path, healed = _convert_and_heal(model, options, json_target)
    else:
        report, path = _convert(model, options, json_target)
        totals = report.totals
        if totals.params_before != totals.params_after and shows(json_target):
            click.echo(_HONEST)
    data = {"path": str(path), "report": report.to_dict()}
    write_json(data | ({} if healed is None else {"healed": as_data(healed)}), json_target)
    made = path if not heal else None if healed is None else healed.path
    if push is not None and made is not None:  # of several processes one has the result
        address = backend().push(made, push)
        if shows(json_target):
            click.echo(f"pushed to {address}")


def _convert(model: str, options: ConvertOptions, json_target: str | None) -> tuple[Report, Path]:
    with progress() as moved:
        made = backend().convert(model, **vars(replace(options, progress=moved)))
    settings().written = made.path
    if shows(json_target):
        show_report(made.report)
        path = str(made.path)
        text = _NEXT.format(path=path, quoted=shlex.quote(path), auto=made.auto_class)
        click.echo(text, nl=False)
    return made.report, made.path


def _convert_and_heal(
    model: str, options: ConvertOptions, json_target: str | None
) -> tuple[Report, Path, HealReport | None]:
    from llmslim.recipe import Recipe
    from llmslim.report.read import read_report
    from llmslim.storage import check_target, open_source

    name = Recipe.of(options.recipe).name if options.recipe else "kphi3"
    source = open_source(model, trust_remote_code=options.trust_remote_code, or_none=True)
    out = Path(options.out or f"{source.name}-{name}")
    target = out.with_name(f"{out.name}-healed")
    check_target(target, options.overwrite)  # before hours of work
    if options.resume and (out / "config.json").is_file():  # it is complete
        click.echo(f"{out} is already converted; healing it", err=True)
        report = read_report(out).report
    else:
        report, out = _convert(model, replace(options, out=out), json_target)
    healed = heal_and_show(
        out,
        json_target,
        out=target,
        # Random weights have no dense model to learn from.
        teacher=model if source.has_weights else None,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    return report, out, healed


def _show_plan(
    model: str, recipe: Recipe, options: ConvertOptions, json_target: str | None
) -> None:
    api = backend()
    from llmslim.conversion.calibrate import texts_of, try_text, with_overrides

    texts, tokens = texts_of(options), options.calibration_tokens
    recipe, init = with_overrides(recipe, options.init, texts, tokens)
    trusted = options.trust_remote_code
    made = api.plan(model, recipe, init=init, trust_remote_code=trusted)
    notes: tuple[str, ...] = ()
    if made.needs_calibration:
        notes = tuple(try_text(model, recipe, trust_remote_code=trusted))
    if shows(json_target):
        show_report(made.report())
        show_cost(made, options.device)
        for note in notes:
            click.echo(f"- {note}")
        click.echo("\ndry run: nothing was written")
    write_json({"report": made.report().to_dict(), "notes": notes}, json_target)


def _is_kphi3(model: str) -> bool:
    """Return whether `model` is a folder with a published kphi-3 model, without torch."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # opening it will report what is wrong
        return False
    return isinstance(config, dict) and config.get("model_type") == "kphi3"
