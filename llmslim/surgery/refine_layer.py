"""Move the weights of a decoder layer's blocks together, on what the layer makes of its stream.

Where all of them lie in the end of the layer, in its MLP as a rule, that end alone is run: what
comes before it does not change.

Shapes: N = windows of L tokens, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from torch import Tensor, nn

from llmslim.init import wide
from llmslim.recipe import Refine
from llmslim.surgery.layer_pair import Ahead, LayerPair
from llmslim.surgery.refine import LOGITS_LR, STEP_TOKENS, Loss, descend, only_moving, output_loss


def refine_layer(
    model: nn.Module,
    pair: LayerPair,
    names: Sequence[str],
    spec: Refine,
    predicted: Callable[[Callable[[int], Tensor]], Loss] | None,
    seed: int,
) -> None:
    """Descend on a layer's output error, then on what the rest of the model predicts from it.

    Args:
        model: that the slim layer is part of; of its other weights no gradients are taken.
        pair: the layer, dense and slim; the slim one is changed.
        names: the modules in it whose weights move.
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
    own = [(held, held.dtype) for held in _floats(pair.slim)]
    for held, _ in own:  # small steps would be lost in bfloat16
        held.data = wide(held.data)
    moving = [p for name in names for p in pair.slim.get_submodule(name).parameters()]
    every = range(len(wanted))
    with only_moving(model, moving):
        for loss, steps, lr in losses:
            descend(
                loss,
                moving,
                every[: pair.fitting],
                every[pair.fitting :],
                each=max(1, STEP_TOKENS // wanted[0].shape[:2].numel()),
                steps=steps,
                lr=lr,
                seed=seed,
            )
    for held, dtype in own:  # each its own: some models keep a few in float32
        held.data = held.data.to(dtype)
    if tail is not None:
        # The module itself, not by way of the pair: a cycle would keep its streams alive.
        pair.ahead.parts, pair.ahead.add = tail.parts, tail.module


def _floats(layer: nn.Module) -> Iterator[Tensor]:
    """Yield a layer's parameters and buffers that are not integers."""
    held = chain(layer.parameters(), layer.buffers())
    return (tensor for tensor in held if tensor.is_floating_point())
