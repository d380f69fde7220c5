"""Train the blocks of one decoder layer together, after the closed forms.

A closed form fits each projection to linear targets and cannot see what the activation between them
makes of its errors. A short gradient descent on the layer's output can. Where all blocks lie in the
end of the layer, as a rule in its MLP, only that end is run: what comes before it does not change.
What layers do to each other is left to a descent of the whole model, see `end_to_end`.

Every parameter's step is in units of its root mean square, so that one learning rate serves every
model and structure. The weights that are best on held-out tokens are kept, the closed form's among
them: refinement never makes a layer worse.

Shapes: windows of N x L tokens, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from torch import Tensor, nn

from llmslim.anatomy.layer_calls import importance
from llmslim.fitting.descent import Loss, descend, only_moving
from llmslim.fitting.layer_pair import LayerOutputs, LayerPair
from llmslim.init import wide
from llmslim.recipe import Refine

STEP_TOKENS = 1024
"""Tokens of one step, at the least."""


def refine_layer(
    model: nn.Module,
    pair: LayerPair,
    names: Sequence[str],
    spec: Refine,
    *,
    dense: list[Tensor] | None,
    seed: int,
) -> LayerOutputs:
    """Descend on a layer's output error.

    Args:
        model: the model that the slim layer is part of; its other weights get no gradients.
        pair: the layer, dense and slim; the slim one is changed.
        names: the modules in it whose weights are trained.
        spec: how many steps of what length.
        dense: the dense stream after the layer, (N, L, D) each, where it is known already.
        seed: of the order of the windows.

    Returns:
        What is known of the streams after the layer.
    """
    wanted = dense or pair.outputs(pair.dense)
    tail = pair.tail(names)

    def run(window: int) -> Tensor:
        if tail is None:
            output: Tensor = pair.run(pair.slim, window)[0]
            return output
        before, x = tail.inputs[window]
        after: Tensor = before + pair.added(tail.module, x)
        return after

    own = [(held, held.dtype) for held in _floats(pair.slim)]
    for held, _ in own:  # small steps would be lost in bfloat16
        held.data = wide(held.data)
    moving = [p for name in names for p in pair.slim.get_submodule(name).parameters()]
    every = range(len(wanted))
    with only_moving(model, moving):
        descend(
            output_loss(run, wanted),
            moving,
            every[: pair.fitting],
            every[pair.fitting :],
            each=max(1, STEP_TOKENS // wanted[0].shape[:2].numel()),
            steps=spec.steps,
            lr=spec.lr,
            seed=seed,
        )
    for held, dtype in own:  # each its own: some models keep a few in float32
        held.data = held.data.to(dtype)
    return LayerOutputs(wanted, tail.inputs, tail.module) if tail else LayerOutputs(wanted, [])


def output_loss(run: Callable[[int], Tensor], wanted: Sequence[Tensor]) -> Loss:
    """Return the squared error of a layer's output, as the fits before it weigh tokens.

    Args:
        run: the layer, from a window's number to its output, (N, L, D); float32.
        wanted: the output wanted of each window.
    """
    weights = [importance(output) for output in wanted]

    def loss(window: int) -> Tensor:
        return ((run(window) - wanted[window]) * weights[window]).square().sum()

    return loss


def _floats(layer: nn.Module) -> Iterator[Tensor]:
    """Yield a layer's parameters and buffers that are not integers."""
    held = chain(layer.parameters(), layer.buffers())
    return (tensor for tensor in held if tensor.is_floating_point())
