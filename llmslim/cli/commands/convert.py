"""`llmslim convert`: make a model smaller and write it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from llmslim.cli.healing import heal_and_show
from llmslim.cli.output import progress, show_cost, show_report
from llmslim.cli.settings import backend, settings

_NEXT = """
wrote {path}

what next
  llmslim generate {quoted} "What is the capital of France?"
  llmslim report {quoted} --full
  python: import llmslim; from transformers import {auto}
          model = {auto}.from_pretrained({path!r})
"""
_HONEST = """\
Nothing was trained after the change: expect the model to be worse than its base until it is
healed (`llmslim heal`)."""


@click.command()
@click.argument("model")
@click.option("-r", "--recipe", help="Name of a shipped recipe, or a recipe file.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to write; by default ./<model>-<recipe>.",
)
@click.option(
    "--init", metavar="NAME", help="How blocks get their weights, in place of the recipe's."
)
@click.option(
    "--calibration",
    multiple=True,
    metavar="NAME|FILE",
    help="Text to fit the blocks to: `self` (sampled from MODEL), a .txt, .jsonl, .json, .csv or "
    ".parquet file (each also .gz), or a data set. Given several times, equal parts of each. "
    "Implies --init least_squares.",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many tokens of it, in all; 65536 where the recipe does not say.",
)
@click.option(
    "--device",
    metavar="NAME",
    help="Where blocks are fitted to text: cpu, cuda, cuda:1 …; by default a GPU, if there is one.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type of the weights; by default as MODEL has them.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="For weights that are drawn.")
@click.option(
    "--trust-remote-code", is_flag=True, help="Run the modeling code that comes with MODEL."
)
@click.option(
    "--allow-nonfinite",
    is_flag=True,
    help="Go on where weights of MODEL are NaN or infinite; the report names them.",
)
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    default="50GB",
    show_default=True,
    help="Largest file of weights, such as 5GB; a larger model gets several and an index.",
)
@click.option("--resume", is_flag=True, help="Go on with a conversion that was interrupted.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace the folder if it exists; throw away an unfinished conversion, unless --resume.",
)
@click.option(
    "--heal",
    is_flag=True,
    help="Train the result too, as the recipe's `heal` section says, with MODEL as its teacher; "
    "written beside it, as FOLDER-healed. With --resume, a finished FOLDER is only healed.",
)
@click.option("--dry-run", is_flag=True, help="Only show the plan, as `llmslim plan` does.")
def command(
    model: str,
    recipe: str | None,
    out: Path | None,
    init: str | None,
    calibration: tuple[str, ...],
    calibration_tokens: int | None,
    device: str | None,
    dtype: str | None,
    seed: int,
    trust_remote_code: bool,
    allow_nonfinite: bool,
    max_shard_size: str,
    resume: bool,
    overwrite: bool,
    heal: bool,
    dry_run: bool,
) -> None:
    """Make MODEL smaller as a recipe says, and write it to a folder.

    MODEL is a hub id, a folder, or a .gguf file. A folder with a published kphi-3 model needs no
    recipe: it is rewritten as it is. The folder appears when it is whole, and not before.

    A folder of safetensors is read, fitted and written one decoder layer at a time: no more has to
    fit into the memory. A run that was killed or found the disk full (exit status 75) goes on with
    --resume. GGUF files, fits to text of the model's own (`self`) or to what it predicts
    (`logits_steps`), and `structure: auto` are converted in memory, from the beginning each time.
    """
    from llmslim.recipe import Recipe, shipped_recipes

    # What is wrong with a recipe is known before torch is imported.
    read = None if recipe is None else Recipe.load(recipe)
    if read is None and not _is_kphi3(model):
        raise click.UsageError(
            f"Missing option '--recipe'; a file, or one of {', '.join(shipped_recipes())}."
        )
    api = backend()
    healed = None
    if heal and not dry_run:
        from llmslim.checkpoint import check_target, open_source

        name = read.name if read else "kphi3"
        out = out or Path(f"{open_source(model, trust_remote_code=trust_remote_code).name}-{name}")
        healed = out.with_name(f"{out.name}-healed")
        check_target(healed, overwrite)  # known before hours of work, not after
        if resume and (out / "config.json").is_file():  # there only when it is whole
            click.echo(f"{out} is converted already; going on with its healing", err=True)
            heal_and_show(out, out=healed, teacher=model, resume=True)
            return
    if dry_run:
        from llmslim.conversion import asked_for, try_text

        wanted = read or Recipe(name="kphi3")
        wanted, init = asked_for(wanted, init, calibration, calibration_tokens)
        made = api.plan(model, wanted, init=init, trust_remote_code=trust_remote_code)
        show_report(made.report())
        show_cost(made, device)
        if made.needs_calibration:
            for note in try_text(model, wanted, trust_remote_code=trust_remote_code):
                click.echo(f"- {note}")
        click.echo("\ndry run: nothing was written")
        return
    with progress() as moved:
        result = api.convert(
            model,
            read,
            out,
            init=init,
            dtype=dtype,
            seed=seed,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_nonfinite=allow_nonfinite,
            max_shard_size=max_shard_size,
            resume=resume,
            overwrite=overwrite,
            progress=moved,
        )
    settings().written = result.path
    show_report(result.report)
    path = str(result.path)
    shown = _NEXT.format(path=path, quoted=shlex.quote(path), auto=result.auto_class)
    click.echo(shown, nl=False)
    totals = result.report.totals
    if healed is not None:
        heal_and_show(result.path, out=healed, teacher=model, resume=resume, overwrite=overwrite)
    elif totals.params_before != totals.params_after:
        click.echo(_HONEST)


def _is_kphi3(model: str) -> bool:
    """Return whether `model` is a folder with a published kphi-3 model; quick, no torch."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # what is wrong is told when it is opened
        return False
    return isinstance(config, dict) and config.get("model_type") == "kphi3"
