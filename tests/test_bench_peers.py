"""The peers of benchmarks/bench_peers.py against plain loops, regressions and brute force."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from tiny import few, logits, tiny_model, tokens
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import _peers
import _tasks
import bench_peers
from bench_peers import DENSE, METHODS, SHIPPED, Job, Row, Score

IDS = tokens(rows=12, length=16)
WIDTH, HIDDEN, LAYERS = 96, 48, 3


def inputs_of_down(model: Any, layer: int, ids: Tensor = IDS) -> Tensor:
    """Return what a layer's down projection reads, (T, M), float64, by a hook of its own."""
    seen: list[Tensor] = []
    down = model.model.layers[layer].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, 1)))
    logits(model, ids)
    handle.remove()
    return torch.cat(seen).double()


def down_weights(model: Any) -> list[Tensor]:
    return [layer.mlp.down_proj.weight.detach().double() for layer in model.model.layers]


def pruned(method: str, keep: float = 0.5) -> tuple[Any, Any]:
    """Return the dense model and the pruned one."""
    dense = tiny_model("llama", num_hidden_layers=LAYERS)
    model = copy.deepcopy(dense)
    bench_peers.shrink(model, Job(method, {"keep": keep}, IDS[:10], IDS[10:], {}, None))
    return dense, model


def kept_neurons(dense: Any, model: Any, layer: int) -> list[int]:
    """Return which neurons a pruned layer kept, by the rows of its gate projection."""
    before = dense.model.layers[layer].mlp.gate_proj.weight
    after = model.model.layers[layer].mlp.gate_proj.weight
    found = [(before == row).all(1).nonzero().flatten().tolist() for row in after]
    assert all(len(one) == 1 for one in found)
    return [one[0] for one in found]


def best(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda j: -scores[j])[:count])


@pytest.mark.parametrize("method", METHODS)
def test_everything_kept_changes_nothing(method: str) -> None:
    dense, model = pruned(method, keep=1.0)
    torch.testing.assert_close(logits(model, IDS), logits(dense, IDS), rtol=1e-5, atol=1e-5)
    assert bench_peers.non_embedding(model) == bench_peers.non_embedding(dense)


@pytest.mark.parametrize("method", few(METHODS, {*METHODS} - {SHIPPED}))
def test_no_method_keeps_more_than_its_share(method: str) -> None:
    dense, model = pruned(method)
    before, after = (bench_peers.mlp_parameters(one) for one in (dense, model))
    share = after / before
    gone = bench_peers.non_embedding(dense) - bench_peers.non_embedding(model)
    assert logits(model, IDS).isfinite().all()
    if method == DENSE:
        assert (share, gone) == (1, 0)
    elif method == "ShortGPT":
        assert share == model.config.num_hidden_layers / LAYERS
        # The layers save what halves of the MLPs would; one layer fewer would not.
        layer = sum(p.numel() for p in dense.model.layers[0].parameters())
        assert before / 2 <= gone < before / 2 + layer
    else:
        assert 0.45 < share <= 0.5
        assert gone == before - after


def test_mean_activation_is_a_mean_over_tokens() -> None:
    dense, model = pruned("mean activation")
    for layer in range(LAYERS):
        x = inputs_of_down(dense, layer, IDS[:10])
        scores = [sum(abs(float(v)) for v in x[:, j]) / len(x) for j in range(WIDTH)]
        assert kept_neurons(dense, model, layer) == best(scores, 48)


def test_wanda_scores_are_those_of_a_loop_on_the_pruned_models_inputs() -> None:
    dense, model = pruned("Wanda-sp")
    for layer, w in enumerate(down_weights(dense)):
        # The layer itself dense, all before it pruned.
        trial = copy.deepcopy(model)
        trial.model.layers[layer] = dense.model.layers[layer]
        x = inputs_of_down(trial, layer, IDS[:10])
        scores = [
            sum(abs(float(w[o, j])) * float(x[:, j].norm()) for o in range(HIDDEN))
            for j in range(WIDTH)
        ]
        chosen = best(scores, 48)
        assert kept_neurons(dense, model, layer) == chosen
        assert torch.equal(model.model.layers[layer].mlp.down_proj.weight.double(), w[:, chosen])


def test_flaps_threshold_is_one_for_all_layers() -> None:
    dense, model = pruned("FLAP")
    scores = []
    for layer, w in enumerate(down_weights(dense)):
        x = inputs_of_down(dense, layer, IDS[:10])
        own = torch.stack([x[:, j].var() * w[:, j].norm() ** 2 for j in range(WIDTH)])
        scores += ((own - own.mean()) / own.std()).tolist()
    # Half of the weights, less a bias in each layer.
    count = (LAYERS * 3 * HIDDEN * WIDTH // 2 - LAYERS * HIDDEN) // (3 * HIDDEN)
    chosen = best(scores, count)
    widths = [len(kept_neurons(dense, model, layer)) for layer in range(LAYERS)]
    assert len(set(widths)) > 1
    for layer in range(LAYERS):
        own = [j - layer * WIDTH for j in chosen if j // WIDTH == layer]
        assert kept_neurons(dense, model, layer) == own


def test_flaps_bias_keeps_the_mean_output() -> None:
    dense, model = pruned("FLAP")
    for layer, w in enumerate(down_weights(dense)):
        x = inputs_of_down(dense, layer, IDS[:10])
        down = model.model.layers[layer].mlp.down_proj
        kept = x[:, kept_neurons(dense, model, layer)]
        ours = kept.mean(0) @ down.weight.double().T + down.bias.double()
        torch.testing.assert_close(ours, x.mean(0) @ w.T, rtol=1e-4, atol=1e-5)
        assert (ours - kept.mean(0) @ down.weight.double().T).abs().max() > 1e-3


def ridge_rows(x: Tensor) -> Tensor:
    """Return rows to append to inputs so that a plain regression on them is OSSCAR's."""
    gram = x.T @ x / len(x)
    ridge = _peers.RIDGE * gram.diagonal().mean() * len(x)
    return torch.cat((x, ridge.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)))


def test_osscar_takes_the_neuron_that_is_made_up_for_best() -> None:
    dense, model = pruned("OSSCAR", keep=95 / 96)
    x, w = inputs_of_down(dense, 0, IDS[:10]), down_weights(dense)[0]
    rows = ridge_rows(x)
    fits = []
    for j in range(WIDTH):
        others = [k for k in range(WIDTH) if k != j]
        weight = torch.linalg.lstsq(rows[:, others], rows @ w.T).solution
        error = (rows[:, others] @ weight - rows @ w.T).square().sum()
        fits.append((float(error), others, weight))
    _, others, weight = min(fits, key=lambda fit: fit[0])
    assert kept_neurons(dense, model, 0) == others
    found = model.model.layers[0].mlp.down_proj.weight.double()
    torch.testing.assert_close(found, weight.T, rtol=1e-4, atol=1e-5)


def test_osscar_goes_on_greedily_and_refits_in_the_pruned_model() -> None:
    dense, model = pruned("OSSCAR", keep=92 / 96)
    trial = copy.deepcopy(model)
    trial.model.layers[1] = dense.model.layers[1]
    rows, w = ridge_rows(inputs_of_down(trial, 1, IDS[:10])), down_weights(dense)[1]
    left = list(range(WIDTH))

    def regression(columns: list[int]) -> tuple[float, Tensor]:
        weight = torch.linalg.lstsq(rows[:, columns], rows @ w.T).solution
        return float((rows[:, columns] @ weight - rows @ w.T).square().sum()), weight

    for _ in range(4):
        gone = min(left, key=lambda j: regression([k for k in left if k != j])[0])
        left.remove(gone)
    assert kept_neurons(dense, model, 1) == left
    found = model.model.layers[1].mlp.down_proj.weight.double()
    torch.testing.assert_close(found, regression(left)[1].T, rtol=1e-4, atol=1e-5)


def test_modegpts_refit_is_a_regression_on_its_neurons() -> None:
    dense, model = pruned("MoDeGPT, MLP")
    for layer, w in enumerate(down_weights(dense)):
        trial = copy.deepcopy(model)
        trial.model.layers[layer] = dense.model.layers[layer]
        x = inputs_of_down(trial, layer, IDS[:10])
        gram = x.T @ x / len(x)
        inverse = torch.linalg.inv(
            gram + _peers.RIDGE * gram.diagonal().mean() * torch.eye(WIDTH, dtype=x.dtype)
        )
        scores = [float(gram[j] @ inverse[:, j]) for j in range(WIDTH)]
        chosen = best(scores, 48)
        assert kept_neurons(dense, model, layer) == chosen
        weight = torch.linalg.lstsq(x[:, chosen], x @ w.T).solution
        found = model.model.layers[layer].mlp.down_proj.weight.double()
        torch.testing.assert_close(found, weight.T, rtol=1e-3, atol=1e-4)


def test_whitened_svd_has_the_least_error_of_its_rank() -> None:
    dense, model = pruned("whitened SVD")
    model.requires_grad_(False)
    for layer, w in enumerate(down_weights(dense)):
        x = inputs_of_down(dense, layer, IDS[:10])
        block = model.model.layers[layer].mlp.down_proj
        error = (x @ w.T - block(x.float()).double()).square().sum()
        singular = torch.linalg.svdvals(x @ w.T)
        assert error == pytest.approx(float(singular[block.rank :].square().sum()), rel=1e-4)
        assert block.rank == (HIDDEN * WIDTH // 2) // (HIDDEN + WIDTH)
        # Both factors have the root of the singular values, one of them on whitened inputs.
        power = (x @ block.down.weight.double().t()).square().mean(0).sqrt()
        torch.testing.assert_close(
            block.up.weight.double().norm(dim=0), power, rtol=1e-3, atol=1e-5
        )


def test_shortgpt_drops_the_layers_that_turn_the_stream_least() -> None:
    dense, model = pruned("ShortGPT", keep=0.6)
    states = []
    for layer in dense.model.layers:
        layer.register_forward_hook(lambda _m, args, out: states.append((args[0], out)))
    logits(dense, IDS[:10])
    influence = []
    for before, after in states:
        a, b = before.flatten(0, 1).double(), after.flatten(0, 1).double()
        cosines = [float(p @ q / (p.norm() * q.norm())) for p, q in zip(a, b, strict=True)]
        influence.append(1 - sum(cosines) / len(cosines))
    count = model.config.num_hidden_layers
    assert 0 < count < LAYERS
    for index, before in enumerate(best(influence, count)):
        kept = model.model.layers[index].mlp.down_proj.weight
        assert torch.equal(kept, dense.model.layers[before].mlp.down_proj.weight)


def test_the_shipped_recipe_is_run_as_it_stands_but_for_its_budget() -> None:
    from llmslim.recipe import Recipe

    shipped = Recipe.load("mlp-half").model_dump(exclude_unset=True)
    ours = bench_peers.our_recipe(SHIPPED, 0.25).model_dump(exclude_unset=True)
    assert ours.pop("budget") == 0.25
    assert shipped.pop("budget") == 0.5
    assert ours == shipped


SETTINGS = {"keep": 0.5, "device": "cpu", "heal_tokens": 100, "calibration": ("a.txt",)}
ROWS = [
    Row(DENSE, 1.0, 1.0, Score({"folder/a.txt": 20.0}, {"piqa": 0.5}), 0.0, 1.0),
    Row(
        "FLAP",
        0.5,
        0.6,
        Score({"folder/a.txt": 50.0}, {"piqa": 0.25}),
        3.0,
        2.0,
        Score({"folder/a.txt": 30.0}, {"piqa": 0.375}),
        4.0,
    ),
]


def test_rows_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert bench_peers.read_rows(path, SETTINGS) == {}
    bench_peers.write_rows(path, SETTINGS, ROWS)
    assert bench_peers.read_rows(path, SETTINGS) == {row.method: row for row in ROWS}
    assert json.loads(path.read_text())["settings"]["keep"] == 0.5
    with pytest.raises(click.UsageError):
        bench_peers.read_rows(path, {**SETTINGS, "keep": 0.6})


def test_a_cell_for_every_head() -> None:
    head = bench_peers.header(ROWS[0], SETTINGS)
    table = [
        dict(zip(range(len(head)), bench_peers.cells(row, ROWS[0], SETTINGS), strict=True))
        for row in ROWS
    ]
    column = head.index("a.txt, healed")
    assert [row[column] for row in table] == ["", "30"]
    assert [row[column + 1] for row in table] == ["", "1.5"]
    assert table[1][head.index("piqa accuracy, healed")] == "0.375"
    assert table[1][head.index("a.txt") + 1] == "2.5"


def test_tasks_that_cannot_be_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _tasks.check_tasks((), {"piqa": None}) == {}
    with pytest.raises(click.UsageError):
        _tasks.check_tasks(("piqa",), {"piqa": None})
    find: Callable[[str], Any] = lambda name: None  # noqa: E731
    monkeypatch.setattr(_tasks.importlib.util, "find_spec", find)
    with pytest.raises(click.UsageError):
        _tasks.check_tasks(("piqa",), {"piqa": "rows.parquet"})
