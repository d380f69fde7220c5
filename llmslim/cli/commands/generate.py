"""`llmslim generate`: let a model answer a prompt."""

from __future__ import annotations

import sys
from typing import Any, get_args

import click

from llmslim.cli.output import json_option, write_json
from llmslim.cli.settings import backend, settings
from llmslim.errors import CheckpointError
from llmslim.options import Dtype, long_dtype


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
@click.option("--device", metavar="NAME", help="Where to run; by default a GPU, if any.")
@click.option(
    "--dtype",
    type=click.Choice(get_args(Dtype)),
    help="Type of the weights; by default as MODEL has them.",
)
@json_option
def command(
    model: str,
    prompt: str,
    max_new_tokens: int,
    system: str | None,
    temperature: float,
    seed: int | None,
    device: str | None,
    dtype: str | None,
    json_target: str | None,
) -> None:
    """Let MODEL answer PROMPT.

    MODEL is a dense or slim model: a hub id, a folder, or a .gguf file. PROMPT may be - for stdin.
    The answer appears while it is generated.
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    backend()
    from llmslim.anatomy.device import device_named
    from llmslim.cli.chat import reply
    from llmslim.storage import check_finite, load_model, load_tokenizer, open_source

    source = open_source(model)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise CheckpointError(
            f"{model}: has no tokenizer; a prompt needs one. Copy the tokenizer files of its base "
            "model into the folder."
        )
    loaded: Any = load_model(source, dtype=long_dtype(dtype))
    # With such weights it would answer nothing, or repeat one token.
    check_finite(loaded.state_dict().items(), source.given, allow_nonfinite=None)
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if json_target != "-":
            click.echo(text, nl=False)

    tokens, seconds = reply(
        loaded.to(device_named(device)),
        tokenizer,
        prompt,
        write=write,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    answer = "".join(pieces).removesuffix("\n")
    found = {"prompt": prompt, "answer": answer, "tokens": tokens, "seconds": seconds}
    write_json(found, json_target)
    if settings().verbose:
        click.echo(f"{tokens} tokens, {tokens / seconds:.1f} tokens/s", err=True)
