"""What a token counts for in a fit, and what a layer's moments are: against sums over tokens."""

from __future__ import annotations

from typing import Any

import torch
from tiny import tiny_model, tokens
from torch import nn

from llmslim.anatomy.layer_calls import importance, record_calls
from llmslim.anatomy.sites import find_layers, find_mlps
from llmslim.fitting.layer_pair import LayerPair
from llmslim.fitting.layer_store import Streams


def test_a_token_of_an_enormous_stream_counts_for_less() -> None:
    """Up to three times the median size all count the same; beyond that, by the size."""
    sizes = torch.tensor([0.1, 1.0, 1.0, 1.0, 2.9, 6.0, 300.0])
    stream = sizes[:, None] * torch.tensor([1.0, -1.0])  # of that root mean square
    expected = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.01])
    torch.testing.assert_close(importance(stream[None])[0, :, 0], expected)


def test_moments_of_what_is_written_to_the_stream_are_weighed_so() -> None:
    """Truth: the layer's own inputs and outputs, with one token a hundred times the others."""
    model = tiny_model("llama", num_hidden_layers=1).double()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] *= 100
    windows = tokens(2, 12)
    windows[0, 4] = 7
    (layer,) = model.model.layers
    seen: dict[str, Any] = {}
    handles = [
        layer.mlp.down_proj.register_forward_hook(lambda _m, x, y: seen.update(x=x[0], y=y)),
        layer.register_forward_hook(lambda _m, _x, y: seen.update(after=y)),
    ]
    with torch.no_grad():
        model(windows[:1], use_cache=False)
    for handle in handles:
        handle.remove()
    rms = seen["after"][0].square().mean(-1).sqrt()
    weight = (3 * rms.median() / rms).clamp_max(1)
    assert float(weight.min()) < 0.2
    x, y = (weight[:, None] * seen[name][0] for name in "xy")
    calls = record_calls(model, [layer], [row[None] for row in windows])
    streams = Streams(calls.hidden, calls.hidden)
    pair = LayerPair(layer, layer, streams, calls.extras[0], 1, None)
    with torch.no_grad():
        found = pair.writer_moments("mlp.down_proj", [])[0].fit
    torch.testing.assert_close(found.gram_II, x.T @ x / 12, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.cross_OI, y.T @ x / 12, rtol=1e-6, atol=1e-12)


def test_the_widest_of_what_looks_like_an_mlp_is_it() -> None:
    for first in (True, False):
        model = tiny_model("llama", num_hidden_layers=1)
        (layer,) = model.model.layers
        side = nn.ModuleDict({"up": nn.Linear(48, 12), "down": nn.Linear(12, 48)})
        layer.add_module("side", side)
        if first:
            layer._modules = {"side": side, **layer._modules}
        (mlp,) = find_mlps(model, find_layers(model))
        assert (mlp.name, mlp.width) == ("model.layers.0.mlp", 96)
