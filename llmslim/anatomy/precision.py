"""Which arithmetic is fast where."""

from __future__ import annotations

from typing import Any

import torch


def bf16_is_fast(device: torch.device) -> bool:
    """Return whether a device multiplies in bfloat16 by itself, faster than in float32.

    Processors that do have AMX, or AVX-512 with bfloat16: there, products and their gradients take
    about half of float32's time, the weights' conversion included.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    cpu: Any = torch.cpu
    return bool(cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported())
