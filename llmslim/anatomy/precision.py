"""Which arithmetic is fast where."""

from __future__ import annotations

import torch

from llmslim.compat import cpu_has_amx, cpu_has_avx512_bf16


def bf16_is_fast(device: torch.device) -> bool:
    """Return whether a device multiplies in bfloat16 by itself, faster than in float32.

    Processors that do have AMX, or AVX-512 with bfloat16: there, products and their gradients take
    about half of float32's time, the weights' conversion included.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu_has_amx() or cpu_has_avx512_bf16()
