"""`llmslim export`: write a slim checkpoint in another form."""

from __future__ import annotations

from pathlib import Path

import click

from llmslim.cli.output import json_option, out_argument, shows, write_json
from llmslim.cli.settings import backend, settings
from llmslim.options import QUANTIZATIONS


@click.command()
@click.argument("slim")
@click.option("--dense", is_flag=True, help="Write an ordinary checkpoint to the folder --out.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write, for --dense.")
@click.option(
    "--gguf",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write this file for llama.cpp; needs the extra `gguf`.",
)
@click.option(
    "--quantize",
    type=click.Choice(QUANTIZATIONS),
    help="Type of the matrices in a GGUF file.  [default: f16]",
)
@click.option("--overwrite", is_flag=True, help="Replace the folder or file if it exists.")
@click.option("--allow-nonfinite", is_flag=True, help="Accept weights that are NaN or infinite.")
@json_option
@out_argument
def command(
    slim: str,
    dense: bool,
    out: Path | None,
    gguf: Path | None,
    quantize: str | None,
    overwrite: bool,
    allow_nonfinite: bool,
    json_target: str | None,
) -> None:
    """Write SLIM for programs that know no llmslim, with every block multiplied out.

    --dense writes an ordinary model of the base class, for transformers, vLLM and others. It
    computes the same as SLIM; MLPs of different widths are filled up with zeros to the widest.

    --gguf writes one file for llama.cpp and what is built on it, with the tokenizer and chat
    template. Layers keep their widths where llama.cpp can read them.
    """
    if dense == (gguf is not None):
        raise click.UsageError("One of '--dense' and '--gguf FILE' is needed.")
    options = {"overwrite": overwrite, "allow_nonfinite": allow_nonfinite}
    if gguf is not None:
        if out is not None:
            raise click.UsageError("'--gguf' names the file itself; leave '--out' away.")
        path = backend().export_gguf(slim, gguf, quantize=quantize or "f16", **options)
    else:
        if out is None:
            raise click.UsageError("Missing option '--out', the folder to write.")
        if quantize is not None:
            raise click.UsageError("'--quantize' is for '--gguf' only.")
        path = backend().export_dense(slim, out, **options)
    settings().written = path
    if shows(json_target):
        click.echo(f"wrote {path}")
    write_json({"path": str(path)}, json_target)
