"""Give freed memory back to the system, which the C library does not always do by itself.

glibc keeps what is freed in pieces of less than 32 MB, and lays the next ones beside it: over a
large model it comes to hold a third more than is in use.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


def give_back() -> None:
    """Return unused pages to the system, where the C library can."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
