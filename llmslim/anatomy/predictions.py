"""Losses on predictions: the divergence from other predictions, and sums over tokens in chunks.

A loss on all logits at once keeps several float32 copies of them; for 4096 tokens and a vocabulary
of 49,152 each takes 805 MB. Chunks that stay in a processor's cache are also three times as fast.
Here the gradient is computed together with the loss, chunk by chunk:
beside the logits there are only their gradient, in the same type, and the float32 work on one
chunk. Recomputing the chunks in the backward pass would keep no gradient, but take twice the work
and, because of autograd's slices, as much memory.

Shapes: N windows of L tokens, T = tokens, C = tokens of a chunk, V = size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

Part = Callable[[Tensor, slice], Tensor]
"""Takes float32 logits (C, V) and the slice of their tokens; returns the sum of their losses."""

CPU_CHUNK = 2**19
"""Logits in one chunk on a processor; 2 MiB in float32."""
CHUNK = 2**24
"""Logits in one chunk elsewhere; 64 MiB in float32."""


def logits_at_once(device: torch.device) -> int:
    """Return how many logits make a chunk on a device."""
    return CPU_CHUNK if device.type == "cpu" else CHUNK


def tokens_at_once(logits_TV: Tensor) -> int:
    """Return how many tokens make a chunk of some logits."""
    return max(1, logits_at_once(logits_TV.device) // logits_TV.shape[-1])


def sum_over_tokens(logits_TV: Tensor, part: Part) -> Tensor:
    """Return the sum of `part` over chunks of tokens, a float32 scalar.

    Args:
        logits_TV: logits, in any float type.
        part: the loss of a chunk.
    """
    total: Tensor = _ChunkedSum.apply(logits_TV, part)  # type: ignore[no-untyped-call]
    return total


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, part: Part) -> Tensor:
        tokens, chunk = len(logits_TV), tokens_at_once(logits_TV)
        wanted = ctx.needs_input_grad[0]
        grad_TV = torch.empty_like(logits_TV) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=logits_TV.device)
        for start in range(0, tokens, chunk):
            where = slice(start, start + chunk)
            logits_CV = logits_TV[where].detach().float().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                loss = part(logits_CV, where)
            if grad_TV is not None:
                grad_TV[where] = torch.autograd.grad(loss, logits_CV)[0]
            total += loss.detach()
        ctx.grad_TV = grad_TV
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        # In place: the gradient is as large as the logits, and is not read again.
        grad_TV, ctx.grad_TV = ctx.grad_TV, None
        return grad_TV.mul_(outputs[0]), None


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of -log p(target), in nats.

    Args:
        logits: (..., V), in any float type.
        targets: the token that each should predict, (...); -100 for none.
    """
    targets_T = targets.reshape(-1)
    return sum_over_tokens(
        logits.reshape(len(targets_T), -1),
        lambda logits_CV, where: cross_entropy(
            logits_CV, targets_T[where], ignore_index=-100, reduction="sum"
        ),
    )


def divergence(log_p_CV: Tensor, log_q_CV: Tensor) -> Tensor:
    """Return KL(p || q) of every token in nats, (C,).

    Args:
        log_p_CV: logarithms of probabilities, of the dense model.
        log_q_CV: of the model that is compared with it.

    Example:
        >>> even, other = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(float(divergence(even, other)), 4)
        0.1438
    """
    return (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(-1)


@torch.no_grad()
def mean_loss(model: Any, ids_NL: Tensor) -> float:
    """Return the mean of -log p(next token) of some text, in nats; its exponential is perplexity.

    Args:
        model: a causal language model, in evaluation mode.
        ids_NL: windows of token ids; the first token of each is not predicted.
    """
    total = 0.0
    for ids_L in ids_NL.to(model.device):
        logits_LV = model(ids_L[None], use_cache=False).logits[0]
        total += float(summed_cross_entropy(logits_LV[:-1], ids_L[1:]))
    return total / ids_NL[:, 1:].numel()
