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
    "--onnx",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Write this folder for onnxruntime; needs the extra `onnx`.",
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
    onnx: Path | None,
    quantize: str | None,
    overwrite: bool,
    allow_nonfinite: bool,
    json_target: str | None,
) -> None:
    """Write SLIM for programs that know no llmslim.

    --dense writes an ordinary model of the base class, for transformers, vLLM and others. It
    computes the same as SLIM, with blocks multiplied out; MLPs of different widths are filled up
    with zeros to the widest.

    --gguf writes one file for llama.cpp and what is built on it, with the tokenizer and chat
    template. Blocks are multiplied out; layers keep their widths where llama.cpp can read them.

    --onnx writes model.onnx in float32, with a cache, and config and tokenizer beside it. Blocks
    stay as they are.
    """
    if [dense, gguf is not None, onnx is not None].count(True) != 1:
        raise click.UsageError("One of '--dense', '--gguf FILE' and '--onnx FOLDER' is needed.")
    if out is not None and not dense:
        raise click.UsageError(
            "'--gguf' and '--onnx' name the place themselves; leave out '--out'."
        )
    if quantize is not None and gguf is None:
        raise click.UsageError("'--quantize' is for '--gguf' only.")
    options = {"overwrite": overwrite, "allow_nonfinite": allow_nonfinite}
    if gguf is not None:
        path = backend().export_gguf(slim, gguf, quantize=quantize or "f16", **options)
    elif onnx is not None:
        path = backend().export_onnx(slim, onnx, **options)
    elif out is not None:
        path = backend().export_dense(slim, out, **options)
    else:
        raise click.UsageError("Missing option '--out', the folder to write.")
    settings().written = path
    if shows(json_target):
        click.echo(f"wrote {path}")
    write_json({"path": str(path)}, json_target)
