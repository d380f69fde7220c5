"""`llmslim generate`: ask a model something."""

from __future__ import annotations

import sys

import click

from llmslim.cli.settings import backend, settings
from llmslim.errors import CheckpointError


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--system", help="A system message, for models with a chat template.")
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
    """Let MODEL answer PROMPT; the text appears as it comes.

    MODEL is a dense or slim model: a hub id, a folder, or a .gguf file. PROMPT may be - for stdin.
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
            f"{model}: it has no tokenizer, so a prompt cannot be read. Copy the tokenizer files "
            "of its base model into it."
        )
    loaded = load_model(source)
    # It would answer with nothing, or with one token over and over.
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
