"""`llmslim generate`: let a model answer a prompt."""

from __future__ import annotations

import sys

import click

from llmslim.cli.settings import backend, settings
from llmslim.errors import CheckpointError


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Maximum length of the answer.",
)
@click.option("--system", help="System message, for models with a chat template.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token each time.",
)
@click.option(
    "--seed", type=click.IntRange(0, (1 << 63) - 1), help="Makes a temperature above 0 repeatable."
)
def command(
    model: str,
    prompt: str,
    max_new_tokens: int,
    system: str | None,
    temperature: float,
    seed: int | None,
) -> None:
    """Let MODEL answer PROMPT.

    MODEL is a dense or slim model: a hub id, a folder, or a .gguf file. PROMPT may be - for stdin.
    The answer appears while it is generated.
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    backend()
    from llmslim.cli.chat import reply
    from llmslim.storage import check_finite, load_model, load_tokenizer, open_source

    source = open_source(model)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise CheckpointError(
            f"{model}: has no tokenizer; a prompt needs one. Copy the tokenizer files of its base "
            "model into the folder."
        )
    loaded = load_model(source)
    # With such weights it would answer nothing, or repeat one token.
    check_finite(loaded.state_dict().items(), source.given, allow_nonfinite=None)
    tokens, seconds = reply(
        loaded,
        tokenizer,
        prompt,
        write=lambda text: click.echo(text, nl=False),
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    if settings().verbose:
        click.echo(f"{tokens} tokens, {tokens / seconds:.1f} tokens/s", err=True)
