"""Move the weights of a decoder layer's blocks together, on what the layer makes of its stream.

Where all of them lie in the end of the layer, in its MLP as a rule, that end alone is run: what
comes before it does not change.

Shapes: N = windows of L tokens, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from llmslim.recipe import Refine
from llmslim.surgery.layer_pair import Ahead, LayerPair
from llmslim.surgery.refine import LOGITS_LR, STEP_TOKENS, Loss, descend, output_loss


def weights_of(layer: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """Return the parameters of some of a layer's modules."""
    return [p for name in names for p in layer.get_submodule(name).parameters()]


def refine_layer(
    pair: LayerPair,
    names: Sequence[str],
    spec: Refine,
    predicted: Callable[[Callable[[int], Tensor]], Loss] | None,
    seed: int,
) -> None:
    """Descend on a layer's output error, then on what the rest of the model predicts from it.

    Args:
        pair: the layer, dense and slim; the slim one is changed.
        names: the modules in it whose weights move; of all others none takes gradients.
        spec: how many steps of what length.
        predicted: makes, of what gives the layer's output by the window's number, (N, L, D), the
            loss of the predictions; None where there is no such descent.
        seed: of the order of the windows.
    """
    wanted = pair.ahead.dense or pair.outputs(pair.dense)
    pair.ahead = Ahead(dense=wanted)
    tail = pair.tail(names)

    def run(window: int) -> Tensor:
        if tail is None:
            output: Tensor = pair.run(pair.slim, window)[0]
            return output
        before, x = tail.parts[window]
        after: Tensor = before + pair.added(tail.module, x)
        return after

    losses = [(output_loss(run, wanted), spec.steps, spec.lr)]
    if predicted is not None:
        losses.append((predicted(run), spec.logits_steps, LOGITS_LR * spec.lr))
    dtype = next(pair.slim.parameters()).dtype
    pair.slim.float()  # small steps would be lost in bfloat16
    every = range(len(wanted))
    for loss, steps, lr in losses:
        descend(
            loss,
            weights_of(pair.slim, names),
            every[: pair.fitting],
            every[pair.fitting :],
            each=max(1, STEP_TOKENS // wanted[0].shape[:2].numel()),
            steps=steps,
            lr=lr,
            seed=seed,
        )
    pair.slim.to(dtype)
    if tail is not None:
        # The module itself, not by way of the pair: a cycle would keep its streams alive.
        pair.ahead.parts, pair.ahead.add = tail.parts, tail.module
