"""Scrambled windows: what is drawn, who sees them, and what they are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model, tokens

import llmslim
from llmslim import fitting, planning
from llmslim.anatomy.layer_calls import run_layer
from llmslim.fitting import layer_pair, layerwise
from llmslim.fitting.calibration import RANDOM_TOKENS, early_layers, with_random_tokens


def test_half_of_the_tokens_are_drawn_and_special_ones_never() -> None:
    config = tiny_config("llama")
    config.bos_token_id, config.eos_token_id = 3, [5, 7]
    windows = torch.full((80, 50), 3)
    found = with_random_tokens(windows, config, seed=0)
    drawn = found[found != windows]
    assert 0.45 < len(drawn) / found.numel() < 0.55
    every = set(range(config.vocab_size)) - {config.pad_token_id, 3, 5, 7}
    assert set(drawn.tolist()) == every  # 2,000 draws of fewer than 100 tokens
    assert torch.equal(found, with_random_tokens(windows, config, seed=0))
    assert not torch.equal(found, with_random_tokens(windows, config, seed=1))


def test_no_more_windows_than_their_share_of_the_work() -> None:
    windows = torch.zeros(RANDOM_TOKENS // 512 + 9, 512, dtype=torch.long)
    assert len(with_random_tokens(windows, tiny_config("llama"), 0)) == RANDOM_TOKENS // 512
    assert [early_layers(count) for count in (1, 4, 30, 80)] == [1, 1, 3, 8]


def halved(layers: str) -> llmslim.Recipe:
    return llmslim.Recipe.of(
        {
            "name": "r",
            "init": "least_squares",
            "replace": [{"match": f"*.{layers}.mlp.*", "structure": "width", "keep_ratio": 0.5}],
        }
    )


def fit(model: Any, layers: str, windows: torch.Tensor) -> None:
    calibration = fitting.TokenWindows(windows, windows[:4])
    fitting.rewrite(model, planning.plan(model, halved(layers)), calibration=calibration)


def test_the_first_layer_is_fit_for_tokens_that_the_text_has_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = tokens(64, 16, vocab=12)  # of 96
    unseen = tokens(16, 16, seed=5).clamp_min(20)

    def after(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.model(unseen, output_hidden_states=True).hidden_states[1]

    whole = tiny_model(seed=3)
    with_them, without = tiny_model(seed=3), tiny_model(seed=3)
    fit(with_them, "0", text)
    monkeypatch.setattr(layerwise, "with_random_tokens", lambda windows, *_args: windows[:0])
    fit(without, "0", text)
    ours, theirs = ((after(m) - after(whole)).square().sum() for m in (with_them, without))
    assert ours < 0.9 * theirs


@pytest.mark.parametrize("layers", ["1", "[01]"])
def test_later_layers_are_fitted_to_the_text_alone(
    layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, set[int]] = {}
    text = tokens(24, 10)
    model = tiny_model()
    numbers = {id(layer): index for index, layer in enumerate(model.model.layers)}

    def count(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if id(layer) in numbers:
            seen.setdefault(numbers[id(layer)], set()).add(id(args[0]))
        return run_layer(layer, *args, **kwargs)

    monkeypatch.setattr(layer_pair, "run_layer", count)
    fit(model, layers, text)
    assert len(seen[1]) == len(text) + 4
    assert len(seen[0]) == len(text) + 4 + (len(text) if layers == "[01]" else 0)
