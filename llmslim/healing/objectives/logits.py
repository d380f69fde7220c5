"""Predict what the dense teacher predicts: distillation.

    T² KL(p || q) w  +  CE (1 - w)      p, q = softmax of the teacher's and the model's logits / T

T is `temperature`, w `teacher_weight`. The factor T² keeps gradients as large as those of the
cross-entropy (Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2). With `top_k` the
K likeliest tokens of the teacher are compared each by itself and all others as one, so that no
probability is lost or made up.

Shapes: N = rows, L = tokens of a row, C = tokens of a chunk, V = vocabulary, K = top_k.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ._chunks import sum_over_tokens
from ._step import Step

NEEDS_TEACHER = True


def loss(step: Step) -> Tensor:
    """Return the sum over predicted tokens of the divergence from the teacher, mixed with CE."""
    teacher_NLV: Tensor = step.teach().logits
    logits_NLV: Tensor = step.forward().logits
    spec, targets_T = step.spec, step.targets_NL.reshape(-1)
    teacher_TV = teacher_NLV.reshape(len(targets_T), -1)

    def part(logits_CV: Tensor, where: slice) -> Tensor:
        targets_C = targets_T[where]
        per_token_C = divergence(teacher_TV[where], logits_CV, spec.temperature, spec.top_k)
        total = spec.teacher_weight * per_token_C[targets_C != -100].sum()
        if spec.teacher_weight < 1:
            text = functional.cross_entropy(
                logits_CV, targets_C, ignore_index=-100, reduction="sum"
            )
            total = total + (1 - spec.teacher_weight) * text
        return total

    return sum_over_tokens(logits_NLV.reshape(len(targets_T), -1), part)


def divergence(
    teacher_CV: Tensor, logits_CV: Tensor, temperature: float, top_k: int | None
) -> Tensor:
    """Return T² KL(teacher || model) of every token, (C,).

    Args:
        teacher_CV: the teacher's logits, in any float type.
        logits_CV: the model's, float32.
        temperature: T.
        top_k: how many tokens are compared each by itself; all where not given.

    Example:
        >>> one = torch.tensor([[1.0, 2.0, 3.0]])
        >>> divergence(one, one, 2.0, None)
        tensor([0.])
    """
    log_p_CV = functional.log_softmax(teacher_CV.float() / temperature, dim=-1)
    log_q_CV = functional.log_softmax(logits_CV / temperature, dim=-1)
    if top_k is not None and top_k < log_p_CV.shape[-1]:
        log_p_CK, kept_CK = log_p_CV.topk(top_k, dim=-1)
        log_q_CK = log_q_CV.gather(-1, kept_CK)
        log_p_CV = torch.cat([log_p_CK, _log_of_the_rest(log_p_CK)], dim=-1)
        log_q_CV = torch.cat([log_q_CK, _log_of_the_rest(log_q_CK)], dim=-1)
    return (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(-1) * temperature**2


def _log_of_the_rest(log_p_CK: Tensor) -> Tensor:
    """Return log(1 - sum p), (C, 1); bounded below, where rounding leaves nothing for the rest."""
    return torch.log1p(-log_p_CK.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
