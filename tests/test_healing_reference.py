"""Healing against a loop of plain torch, made by hand: no Trainer, no packing, no LoRA layer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers_healing import LENGTH, healed, independent_loss, slimmed, text
from tiny import tiny_model
from torch.func import functional_call
from torch.nn import functional

from llmslim.healing.trainable import make_trainable
from llmslim.recipe import Heal

ROWS, BATCH, PASSES, SEED, RATE = 10, 4, 2, 7, 5e-3
STEPS = PASSES * math.ceil(ROWS / BATCH)
# One step of warm-up, half way to the peak; then half a cosine that would be 0 after the last step.
RATES = [RATE / 2] + [
    RATE * (1 + math.cos(math.pi * n / (STEPS - 1))) / 2 for n in range(STEPS - 1)
]
SETTINGS = {"epochs": PASSES, "batch_size": BATCH, "micro_batch": 2, "seed": SEED}
SETTINGS |= {"learning_rate": RATE, "warmup": 0.03, "precision": "fp32", "weight_decay": 0.1}
OBJECTIVES = {
    "cross_entropy": {},
    "logits": {"temperature": 2.0, "teacher_weight": 0.6},
    "stored": {"temperature": 2.0, "teacher_weight": 0.6, "store_teacher": True, "top_k": 96},
}


def by_hand(model, train, teacher):
    """Train; return each step's loss, gradient norm and tokens, and the weights in float32."""
    weights = {n: p.detach().float() for n, p in model.named_parameters()}
    blocks = [n for n in weights if ".mlp." in n]
    leaves = {n: weights[n] for n in (weights if train == "all" else blocks)}
    pairs = {}
    if (
        train == "lora"
    ):  # the random halves are as good as any others; what is done with them is not
        ready = make_trainable(copy.deepcopy(model), Heal(train="lora", seed=SEED))
        for name in ready.lora:
            layer = ready.model.get_submodule(name)
            leaves[f"{name} A"] = layer.lora_A["default"].weight.detach().clone()
            leaves[f"{name} B"] = torch.zeros_like(layer.lora_B["default"].weight)
            pairs[f"{name}.weight"] = f"{name} B", f"{name} A"
    leaves = {n: leaf.clone().requires_grad_() for n, leaf in leaves.items()}
    plain = copy.deepcopy(model).float()

    def now():
        low_rank = {n: weights[n] + 2 * leaves[b] @ leaves[a] for n, (b, a) in pairs.items()}
        return {**weights, **{n: leaf for n, leaf in leaves.items() if n in weights}, **low_rank}

    matrices = [leaf for leaf in leaves.values() if leaf.ndim > 1]
    vectors = [leaf for leaf in leaves.values() if leaf.ndim == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    )
    ids, steps, seen = text(train=ROWS).train.ids, [], 0
    for epoch in range(PASSES):
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(SEED + epoch))
        for rows in order.split(BATCH):
            samples = ids[rows].reshape(-1, LENGTH // 2)
            logits = functional_call(plain, now(), (samples,)).logits[:, :-1].reshape(-1, 96)
            loss = functional.cross_entropy(logits, samples[:, 1:].reshape(-1))
            if teacher is not None:
                with torch.no_grad():
                    wanted = teacher(samples).logits[:, :-1].reshape(-1, 96).float()
                kl = functional.kl_div(
                    (logits / 2).log_softmax(-1),
                    (wanted / 2).log_softmax(-1),
                    log_target=True,
                    reduction="batchmean",
                )
                loss = 0.6 * 4 * kl + 0.4 * loss
            for group in optimiser.param_groups:
                group["lr"] = RATES[len(steps)]
            optimiser.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
            optimiser.step()
            seen += samples.numel()
            steps.append((loss.item(), norm.item(), seen))
    plain.load_state_dict({n: w.detach() for n, w in now().items()}, strict=False)
    return steps, plain


CASES = [
    pytest.param(
        objective,
        dtype,
        id=f"{objective} {str(dtype).removeprefix('torch.')}",
        # The arithmetic is the same; the rest of float32 is seen in one objective.
        marks=[pytest.mark.slow] if teacher and dtype == torch.float32 else [],
    )
    for objective, teacher in OBJECTIVES.items()
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("objective", "dtype"), CASES)
@pytest.mark.parametrize("train", ["all", "blocks", "lora"])
def test_every_step_is_that_of_a_plain_loop(tmp_path, train, objective, dtype):
    model, rows = slimmed(dtype=dtype), text(train=ROWS, held_out=3)
    teacher = None if objective == "cross_entropy" else tiny_model(seed=3)
    steps, plain = by_hand(model, train, teacher)
    report = healed(
        model,
        tmp_path / "w",
        rows,
        train=train,
        teacher=teacher,
        evaluate_every=STEPS,
        **{**SETTINGS, **OBJECTIVES[objective]},
    )
    lines = [line for line in report.history if "loss" in line]
    assert [line["loss"] for line in lines] == pytest.approx([s[0] for s in steps], rel=2e-4)
    assert [line["grad_norm"] for line in lines] == pytest.approx([s[1] for s in steps], rel=2e-3)
    assert [line["learning_rate"] for line in lines] == pytest.approx(RATES)
    assert [line["tokens"] for line in lines] == [s[2] for s in steps]
    assert (report.steps, report.tokens) == (STEPS, PASSES * rows.train.tokens)
    learned = independent_loss(plain, rows.held_out)
    if dtype == torch.float32:
        assert report.loss_unrounded is None
        assert report.loss_after == pytest.approx(learned, rel=5e-4)
    else:
        assert report.loss_unrounded == pytest.approx(learned, rel=5e-4)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert report.loss_after == pytest.approx(
        independent_loss(model.float(), rows.held_out), rel=1e-5
    )
