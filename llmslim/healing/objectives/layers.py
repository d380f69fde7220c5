"""Let every decoder layer give what the teacher's layer gives.

    mean over layers of ‖s - t‖² / ‖t‖²      s, t = the stream after the layer, for one token

Each token counts relative to its own size: a few have streams a thousand times longer than the
others, and would be all that is learned. The stream after a layer is what all later ones read, so
this trains every layer at once, near where its error arises, and is meant for the first steps,
when the logits of a freshly slimmed model say little (`layers_share`). The head learns nothing.

Shapes: N = rows, L = tokens of a row, H = hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.errors import HealingError

from ._step import Step

NEEDS_TEACHER = True


def loss(step: Step) -> Tensor:
    """Return the sum over predicted tokens of the layers' mean relative squared error.

    Raises:
        HealingError: if the teacher's hidden states are of another size.
    """
    with _outputs([theirs for _, theirs in step.layers]) as wanted:
        step.teach(**_few_logits(step.teacher))
    with _outputs([ours for ours, _ in step.layers]) as given:
        unread = step.forward(**_few_logits(step.model)).logits
    counted_NL = step.targets_NL != -100
    # Several processes wait for the gradients of all parameters: those of the head are 0.
    total: Tensor = 0.0 * unread.sum(dtype=torch.float32)
    for s_NLH, t_NLH in zip(given, wanted, strict=True):
        if s_NLH.shape != t_NLH.shape:
            raise HealingError(
                f"heal.objective: layers, but hidden states have {s_NLH.shape[-1]} channels here "
                f"and {t_NLH.shape[-1]} in the teacher; both need as many. Use `logits`."
            )
        error_NL = (s_NLH.float() - t_NLH.float()).square().sum(-1)
        size_NL = t_NLH.float().square().sum(-1)
        relative_NL = error_NL / size_NL.clamp(min=1e-12)
        total = total + relative_NL[counted_NL].sum() / len(given)
    return total


@contextmanager
def _outputs(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what the layers return, in their order, while the context lasts.

    Only while it lasts: gradient checkpointing runs layers again in the backward pass.
    """
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _few_logits(model: Any) -> dict[str, int]:
    """Return the option that spares computing logits nobody reads, where the model has it."""
    inner = getattr(model, "module", model)
    known = "logits_to_keep" in inspect.signature(inner.forward).parameters
    return {"logits_to_keep": 1} if known else {}
