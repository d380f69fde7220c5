"""Losses over a whole vocabulary with their gradients, in chunks, against torch on all logits.

    python benchmarks/bench_losses.py [--tokens 512] [--vocabulary 49152] [--dtype bfloat16]

Cross-entropy, and the divergence from other predictions, as healing and the training end to end
take them (`sum_over_tokens`), beside the same in torch on float32 copies of all logits at once, and
beside larger chunks. Milliseconds of processor time on one thread, medians over interleaved rounds.

Shapes: T tokens, C of them in a chunk, V words of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import click
import torch
from _common import machine, markdown, medians, set_up
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmslim.anatomy import predictions
from llmslim.anatomy.predictions import Part, divergence, sum_over_tokens

_ROUNDS = 8


def whole(part: Part, logits_TV: Tensor) -> Tensor:
    """Return a loss on all logits at once."""
    return part(logits_TV.float(), slice(None))


def gradient(loss: Callable[[Tensor], Tensor], logits_TV: Tensor) -> Tensor:
    """Return the gradient of a loss by the logits."""
    leaf_TV = logits_TV.detach().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf_TV), leaf_TV)
    return found


@click.command()
@click.option("--tokens", default=512, show_default=True)
@click.option("--vocabulary", default=49_152, show_default=True)
@click.option("--dtype", default="bfloat16", type=click.Choice(["float32", "bfloat16"]))
def main(tokens: int, vocabulary: int, dtype: str) -> None:
    """Print a table."""
    set_up(1)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    dense_TV, logits_TV = (3 * torch.randn(2, tokens, vocabulary)).to(kind).unbind()
    targets_T = torch.randint(vocabulary, (tokens,))

    def text(logits_CV: Tensor, where: slice) -> Tensor:
        return cross_entropy(logits_CV, targets_T[where], reduction="sum")

    def apart(logits_CV: Tensor, where: slice) -> Tensor:
        expected_CV = dense_TV[where].float().log_softmax(-1)
        return divergence(expected_CV, logits_CV.log_softmax(-1)).sum()

    lines, sizes = [], (predictions.CHUNK, predictions.CPU_CHUNK)
    for name, part in (("cross-entropy", text), ("divergence", apart)):

        def chunked(numbers: int, part: Part = part) -> Tensor:
            with mock.patch.object(predictions, "CPU_CHUNK", numbers):
                return gradient(lambda x_TV: sum_over_tokens(x_TV, part), logits_TV)

        def at_once(part: Part = part) -> Tensor:
            return gradient(lambda x_TV: whole(part, x_TV), logits_TV)

        torch.testing.assert_close(chunked(sizes[1]), at_once(), rtol=2e-2, atol=1e-4)
        runs: list[Callable[[], object]] = [at_once]
        runs += [partial(chunked, numbers) for numbers in sizes]
        found = medians(runs, _ROUNDS)
        lines.append([name, *(f"{each:.0f}" for each in found)])
    click.echo(f"{machine('cpu')}, {dtype}, {tokens} tokens, vocabulary {vocabulary:,}\n")
    heads = [f"chunks of {numbers:,}" for numbers in sizes]
    click.echo(markdown(["loss", "torch, all at once", *heads], lines))


if __name__ == "__main__":
    main()
