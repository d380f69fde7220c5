"""What is made smaller, against torch's and transformers' own losses."""

from __future__ import annotations

import pytest
import torch
from helpers_healing import Rows, slimmed
from tiny import tiny_model
from torch.nn import functional

from llmslim.anatomy import predictions
from llmslim.anatomy.predictions import summed_cross_entropy
from llmslim.data import collate
from llmslim.errors import HealingError
from llmslim.healing import objective_named
from llmslim.healing.objectives._step import Step
from llmslim.plugins import OBJECTIVES
from llmslim.recipe import Heal


def step_of(model, teacher=None, **spec):
    batch = collate([Rows(3, 1)[index] for index in range(3)])
    labels = batch.pop("labels")
    labels[0, 3:6] = -100
    return Step(model, batch, labels, Heal(**spec), teacher)


def predicted(step):
    """Return which places predict something, and what, worked out place by place."""
    pairs = [
        (row, at, int(step.labels_NL[row, at + 1]))
        for row in range(step.labels_NL.shape[0])
        for at in range(step.labels_NL.shape[1] - 1)
        if step.labels_NL[row, at + 1] != -100
    ]
    rows, places, targets = map(list, zip(*pairs, strict=True))
    return rows, places, torch.tensor(targets)


@pytest.fixture(params=[2**24, 96 * 5], ids=["one chunk", "several chunks"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(predictions, "CPU_CHUNK", request.param)


def test_objectives_are_the_files():
    assert OBJECTIVES.names() == ["cross_entropy", "logits"]
    assert [objective_named(name).needs_teacher for name in OBJECTIVES.names()] == [False, True]


@pytest.mark.parametrize("name", ["kl", "_step", "../logits", ""])
def test_an_unknown_objective_is_reported_with_the_known_ones(name):
    with pytest.raises(HealingError, match=rf"objective: '{name}'; .*cross_entropy, logits\."):
        objective_named(name)


def test_cross_entropy_is_transformers_own(chunks):
    model = slimmed()
    step = step_of(model)
    count = len(predicted(step)[0])
    own = model(**step.inputs, labels=step.labels_NL, use_cache=False).loss * count
    ours = objective_named("cross_entropy").loss(step)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=0)
    parameters = list(model.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(own, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.0, 1.0), (2.0, 0.25)])
def test_distillation_is_torchs_kl_div(chunks, temperature, weight):
    model, teacher = slimmed(), tiny_model(seed=3)
    step = step_of(model, teacher, temperature=temperature, teacher_weight=weight)
    rows, places, targets = predicted(step)
    q, p = (m(**step.inputs, use_cache=False).logits[rows, places] for m in (model, teacher))
    kl = functional.kl_div(
        functional.log_softmax(q / temperature, -1),
        functional.log_softmax(p / temperature, -1).detach(),
        reduction="sum",
        log_target=True,
    )
    own = weight * temperature**2 * kl + (1 - weight) * functional.cross_entropy(
        q, targets, reduction="sum"
    )
    ours = objective_named("logits").loss(step)
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    parameters = list(model.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(own, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("top_k", [1, 5, 95])
def test_top_k_compares_the_rest_as_one(top_k):
    model, teacher = slimmed(), tiny_model(seed=3)
    step = step_of(model, teacher, top_k=top_k)
    rows, places, _ = predicted(step)
    q, p = (m(**step.inputs, use_cache=False).logits[rows, places] for m in (model, teacher))
    p, q = (x.detach().double().softmax(-1) for x in (p, q))
    total = 0.0
    for p_V, q_V in zip(p, q, strict=True):
        kept = p_V.argsort(descending=True)[:top_k]
        rest = [i for i in range(96) if i not in set(kept.tolist())]
        pairs = [(p_V[i], q_V[i]) for i in kept] + [(p_V[rest].sum(), q_V[rest].sum())]
        total += float(sum(a * (a / b).log() for a, b in pairs))
    assert objective_named("logits").loss(step).item() == pytest.approx(total, rel=1e-3)


def test_top_k_of_everything_is_the_whole_divergence():
    model, teacher = slimmed(), tiny_model(seed=3)
    whole, all_tokens = (step_of(model, teacher, top_k=k) for k in (None, 96))
    logits = objective_named("logits")
    torch.testing.assert_close(logits.loss(whole), logits.loss(all_tokens), rtol=0, atol=0)


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn():
    model = slimmed()
    loss = objective_named("logits").loss(step_of(model, model))
    assert loss.item() == pytest.approx(0, abs=1e-5)


def test_a_share_of_a_loss_has_that_share_of_its_gradient():
    draw = torch.Generator().manual_seed(0)
    ours = torch.randn(2, 5, 7, generator=draw).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    targets = torch.randint(0, 7, (2, 5), generator=draw)
    targets[0, 1] = -100
    (0.25 * summed_cross_entropy(ours, targets)).backward()
    plain = functional.cross_entropy(theirs.flatten(0, 1), targets.flatten(), reduction="sum")
    (0.25 * plain).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
