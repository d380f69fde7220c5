"""Predictions of the dense rest of a model from the output of one slim layer.

An error in a layer's output matters only through the later layers: errors of the same size cost
little in one direction and much in another. A descent on the predictions takes that into account.
Each step needs a forward and a backward pass through the layers that follow and the head, so this
is for a GPU, or for the last layers of a small model.

Shapes: windows of N x L tokens, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from llmslim.anatomy.layer_calls import Calls, TailModel, run_layer
from llmslim.fitting.refine import Loss


class Predictions:
    """The dense model's predictions on windows of text, compared with those from a slim layer.

    The dense ones are kept as hidden states after the last layer, from which a window's logits are
    computed when needed: a vocabulary is many times as wide.

    Args:
        model: in memory, dense.
        layers: its decoder layers, in order.
        calls: what they are called with.
        windows: token ids, (N, L) each.
        dropped: layers that the slim model does not have, by index.
        autocast: type of the dense layers' products; None for their own.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[nn.Module],
        calls: Calls,
        windows: Sequence[Tensor],
        dropped: Collection[int],
        autocast: torch.dtype | None,
    ) -> None:
        self._tail = TailModel(model, layers, windows[0], dropped)
        self._windows, self._end = list(windows), len(layers)
        self._dense = []
        for number, hidden in enumerate(calls.hidden):
            for layer, extras in zip(layers, calls.extras, strict=True):
                output, _ = run_layer(layer, hidden, extras[number], autocast=autocast)
                assert output is not None
                hidden = output
            self._dense.append(hidden)

    def drop_first(self, count: int) -> None:
        """Forget the first windows."""
        del self._windows[:count], self._dense[:count]

    def loss(self, index: int, run: Callable[[int], Tensor]) -> Loss:
        """Return the divergence of predictions from the dense ones, KL(dense || slim) in nats.

        Args:
            index: of a layer; those after it are dense.
            run: the layer, from a window's number to its output, (N, L, D).
        """

        def loss(window: int) -> Tensor:
            with torch.no_grad():
                expected = self._logits(self._end, self._dense[window], window)
            got = self._logits(index + 1, run(window), window)
            return kl_div(got, expected, reduction="sum", log_target=True)

        return loss

    def _logits(self, start: int, hidden: Tensor, window: int) -> Tensor:
        logits = self._tail.logits(start, hidden, self._windows[window])
        return logits.float().log_softmax(-1)
