"""What fitting a plan will take, from integers alone: memory and operations.

An estimate for deciding, good to a factor of two: it counts products of matrices and what is held
at once, and leaves out everything else.

Shapes: T = calibration tokens, D = hidden size, I = in_features, O = out_features.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import psutil
import torch

from llmslim.anatomy import bf16_is_fast
from llmslim.editing.plans import Plan
from llmslim.fitting.allocation import FIT_TOKENS, JUDGED_TOKENS, PROBE_TOKENS
from llmslim.fitting.calibration import EARLY_LAYERS, random_token_count
from llmslim.fitting.end_to_end import CHECKS, TRAINED_BYTES
from llmslim.fitting.refine import STEP_TOKENS
from llmslim.recipe import Calibration
from llmslim.report.report import WIDTH, Row

_HELD_OUT = 17 / 16
"""Tokens in all for each token to fit on."""
_SAMPLING = 2
"""What a sampled token costs over a read one: one position at a time uses a processor worse."""


@dataclass(frozen=True)
class Cost:
    """What fitting takes beyond loading and writing the model."""

    tokens: int
    memory: int
    """Bytes beside the model's own weights."""
    flops: int
    """Floating-point operations of the products."""


def fitting_cost(plan: Plan) -> Cost | None:
    """Return what fitting a plan's blocks to text will take, None where nothing is fitted."""
    if not plan.needs_calibration:
        return None
    spec = plan.recipe.calibration or Calibration()
    tokens = int(spec.tokens * _HELD_OUT)
    config = plan.config.get_text_config()
    hidden, layers = config.hidden_size, max(1, config.num_hidden_layers)
    rows = [row for row in plan.rows if row.in_features and row.out_features]
    inner = [row for row in rows if not row.counts_as_embedding]
    layer_flops = sum(row.flops_per_token_before for row in inner)
    model_flops = layer_flops + sum(r.flops_per_token_before for r in plan.rows if r.kind == "head")
    fitted = [row for row in rows if row.action == "replaced" and _has_moments(row)]
    sizes = [(row.in_features or 0, row.out_features or 0) for row in fitted]
    # The dense and the slim stream, and once more up to projections inside the layer.
    passes = 3 if any(row.structure != WIDTH for row in fitted) else 2
    moments = sum(2 * (i * i + i * o + o * o) for i, o in sizes)
    scrambled = random_token_count(spec.tokens)
    flops = int(tokens + EARLY_LAYERS * scrambled) * (passes * layer_flops + moments)
    if plan.recipe.has_auto:
        flops += (FIT_TOKENS + JUDGED_TOKENS) * (layer_flops + sum(2 * i * i for i, _ in sizes))
        flops += len(fitted) * PROBE_TOKENS * (model_flops - layer_flops // 2)
    if plan.recipe.refine is not None:
        # Forward and backward: three times a pass of what moves, and as much as one in checks.
        per_token = sum(row.flops_per_token_after for row in rows if row.action == "replaced")
        flops += 4 * plan.recipe.refine.steps * STEP_TOKENS * per_token
    trained = _end_to_end(plan, rows, model_flops - layer_flops)
    flops += trained.flops
    if "self" in spec.texts:
        flops += _SAMPLING * tokens * model_flops // len(spec.texts)
    largest = max((8 * (i * i + i * o + o * o) for i, o in sizes), default=0)
    streams = 4 * 4 * (tokens + scrambled) * hidden  # both, before and after the layer, float32
    layer_bytes = 2 * 4 * (layer_flops // 2) // layers
    probes = 2 * PROBE_TOKENS * config.vocab_size if plan.recipe.has_auto else 0
    layers_at_once = streams + 6 * largest + layer_bytes + probes
    return Cost(spec.tokens, max(layers_at_once, trained.memory), flops)


def _end_to_end(plan: Plan, rows: list[Row], head_flops: int) -> Cost:
    """Return what training end to end takes: the whole slim model, forward and backward."""
    refine = plan.recipe.refine
    if refine is None or refine.end_to_end is None:
        return Cost(0, 0, 0)
    spec, text = refine.end_to_end, plan.recipe.calibration or Calibration()
    step = max(1, spec.tokens // text.sequence_length) * text.sequence_length
    slim = head_flops + sum(r.flops_per_token_after for r in rows if not r.counts_as_embedding)
    checks = (CHECKS + 1) * text.tokens // 16
    flops = spec.steps * step * (3 * slim + head_flops) + checks * (slim + head_flops)
    return Cost(text.tokens, _training_memory(plan, recompute=False), flops)


def _training_memory(plan: Plan, *, recompute: bool) -> int:
    """Return the bytes that training end to end takes beside the slim model's weights."""
    config = plan.config.get_text_config()
    window = (plan.recipe.calibration or Calibration()).sequence_length
    trained = sum(row.params_after for row in plan.rows if row.action == "replaced")
    # What linear maps read and give; with recomputing, of one layer, and every layer's input.
    passed = [
        (row.in_features or 0) + (row.out_features or 0)
        for row in plan.rows
        if row.kind == "projection" and row.action != "dropped"
    ]
    layers = max(1, config.num_hidden_layers)
    kept = sum(passed) // layers + layers * config.hidden_size if recompute else sum(passed)
    # Logits, their gradient and the dense model's.
    return TRAINED_BYTES * trained + 4 * window * int(kept + 3 * config.vocab_size)


def fit_for_training(plan: Plan, device: torch.device, *, loaded: bool) -> tuple[Plan, bool]:
    """Leave the training end to end out of a plan where the memory is too small for it.

    Args:
        plan: of the conversion.
        device: where it is done.
        loaded: whether the model is there already.

    Returns:
        The plan, with a note where something was left out, and whether activations are to be
        computed twice to save memory.
    """
    refine = plan.recipe.refine
    if not plan.needs_calibration or refine is None or refine.end_to_end is None:
        return plan, False
    free = free_memory(device)
    weights = 0 if loaded else sum(row.bytes_after for row in plan.rows)
    for recompute in (False, True):
        needed = weights + _training_memory(plan, recompute=recompute)
        if needed <= free:
            return plan, recompute
    note = (
        f"Not trained end to end: that takes {needed / 2**30:.1f} GiB of memory, and "
        f"{free / 2**30:.1f} GiB are free on {device}. Train the result with `llmslim heal`."
    )
    spec = refine.model_copy(update={"end_to_end": None})
    recipe = plan.recipe.model_copy(update={"refine": spec})
    return replace(plan, recipe=recipe, notes=(*plan.notes, note)), False


def free_memory(device: torch.device) -> int:
    """Return how many bytes are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def speed(device: torch.device) -> float:
    """Return how many operations a second a device multiplies with, measured in a moment."""
    side = 1024
    dtype = torch.bfloat16 if bf16_is_fast(device) else torch.float32
    a, b = torch.rand(2, side, side, device=device, dtype=dtype)
    float((a @ b).sum())
    start, times = time.perf_counter(), 4
    for _ in range(times):
        c = a @ b
    float(c.sum())  # waits for a device that works on its own
    return 2 * side**3 * times / (time.perf_counter() - start)


def _has_moments(row: Row) -> bool:
    """Return whether a row's inputs are looked at: of a narrower MLP, its last map's alone."""
    return row.structure != WIDTH or (row.out_features or 0) < (row.in_features or 0)
