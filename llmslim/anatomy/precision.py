"""The one rule for where bfloat16 is fast, for fitting and healing."""

from __future__ import annotations

import torch

from llmslim.compat import cpu_has_amx, cpu_has_avx512_bf16


def bf16_is_fast(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16, faster than those for float32.

    Processors with AMX, or with AVX-512 and bfloat16, have them: products and their gradients take
    about half of float32's time there, conversion of the weights included, and a step of healing,
    optimiser included, about two thirds.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu_has_amx() or cpu_has_avx512_bf16()
