"""Predict what the dense teacher predicts: distillation.

    T² KL(p || q) w  +  CE (1 - w)      p, q = softmax of the teacher's and the model's logits / T

T is `temperature`, w `teacher_weight`. The factor T² keeps gradients as large as those of the
cross-entropy (Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2). With `top_k` the
teacher's K likeliest tokens are compared one by one and all others as one class, so probabilities
still sum to 1. Stored predictions of the teacher (`store_teacher`) give the same loss.

Shapes: N = rows, L = tokens of a row, C = tokens of a chunk, V = vocabulary, K = top_k.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from llmslim.anatomy import predictions
from llmslim.anatomy.predictions import Part, sum_over_tokens
from llmslim.errors import HealingError

from ._step import Step, TeacherTopK

NEEDS_TEACHER = True


def loss(step: Step) -> Tensor:
    """Return the sum over predicted tokens of the divergence from the teacher, mixed with CE."""
    stored = step.teacher_topk
    divergence_of = _from_teacher(step) if stored is None else _from_stored(step, stored)
    logits_NLV: Tensor = step.forward().logits
    spec, targets_T = step.spec, step.targets_NL.reshape(-1)

    def part(logits_CV: Tensor, where: slice) -> Tensor:
        targets_C = targets_T[where]
        total = spec.teacher_weight * divergence_of(logits_CV, where)
        if spec.teacher_weight < 1:
            text = functional.cross_entropy(
                logits_CV, targets_C, ignore_index=-100, reduction="sum"
            )
            total = total + (1 - spec.teacher_weight) * text
        return total

    return sum_over_tokens(logits_NLV.reshape(len(targets_T), -1), part)


def _from_teacher(step: Step) -> Part:
    """Return the summed divergence from a live teacher, as a function of a chunk of tokens."""
    teacher_NLV: Tensor = step.teach().logits
    spec, counted_T = step.spec, (step.targets_NL != -100).reshape(-1)
    teacher_TV = teacher_NLV.reshape(len(counted_T), -1)

    def part(logits_CV: Tensor, where: slice) -> Tensor:
        per_token_C = divergence(teacher_TV[where], logits_CV, spec.temperature, spec.top_k)
        return per_token_C[counted_T[where]].sum()

    return part


def _from_stored(step: Step, stored: TeacherTopK) -> Part:
    """Return the summed divergence from stored predictions, as a function of a chunk.

    Raises:
        HealingError: if they are for other rows.
    """
    counted_T = (step.targets_NL != -100).reshape(-1)
    if int(counted_T.sum()) != len(stored.log_p_PK):
        raise HealingError(
            f"heal.store_teacher: {len(stored.log_p_PK)} tokens stored for rows that predict "
            f"{int(counted_T.sum())}; the text has changed. Start over (--overwrite)."
        )
    place_T = counted_T.cumsum(0) - 1

    def part(logits_CV: Tensor, where: slice) -> Tensor:
        counted_C = counted_T[where]
        places = place_T[where][counted_C]
        log_q_CV = functional.log_softmax(logits_CV[counted_C] / step.spec.temperature, dim=-1)
        return _of_the_top(
            stored.log_p_PK[places], stored.tokens_PK[places], log_q_CV, step.spec.temperature
        ).sum()

    return part


def divergence(
    teacher_CV: Tensor, logits_CV: Tensor, temperature: float, top_k: int | None
) -> Tensor:
    """Return T² KL(teacher || model) of every token, (C,).

    Args:
        teacher_CV: the teacher's logits, in any float type.
        logits_CV: the model's, float32.
        temperature: T.
        top_k: number of tokens to compare one by one; None for all.

    Example:
        >>> one = torch.tensor([[1.0, 2.0, 3.0]])
        >>> divergence(one, one, 2.0, None)
        tensor([0.])
    """
    log_p_CV = functional.log_softmax(teacher_CV.float() / temperature, dim=-1)
    log_q_CV = functional.log_softmax(logits_CV / temperature, dim=-1)
    if top_k is not None and top_k < log_p_CV.shape[-1]:
        log_p_CK, kept_CK = log_p_CV.topk(top_k, dim=-1)
        return _of_the_top(log_p_CK, kept_CK, log_q_CV, temperature)
    return predictions.divergence(log_p_CV, log_q_CV) * temperature**2


def _of_the_top(log_p_CK: Tensor, kept_CK: Tensor, log_q_CV: Tensor, temperature: float) -> Tensor:
    """Return T² KL of every token, (C,): the K likeliest one by one, all others as one class."""
    log_q_CK = log_q_CV.gather(-1, kept_CK)
    with_rest = (
        torch.cat([some_CK, _log_of_the_rest(some_CK)], dim=-1) for some_CK in (log_p_CK, log_q_CK)
    )
    return predictions.divergence(*with_rest) * temperature**2


def _log_of_the_rest(log_p_CK: Tensor) -> Tensor:
    """Return log(1 - sum p), (C, 1), with a lower bound against rounding."""
    return torch.log1p(-log_p_CK.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
