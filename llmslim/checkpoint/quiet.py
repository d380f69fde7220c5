"""Keep transformers from talking while a library call loads or saves.

What is worth saying, llmslim says itself: as an error, or in a report.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging

_GGUF: Any = modeling_gguf_pytorch_utils
"""Its bar over tensors asks no switch: it is taken away by name."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' and the hub's logs and progress bars; restore what was set before."""
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    no_hub_bars = are_progress_bars_disabled()
    gguf_bar = _GGUF.tqdm
    _GGUF.tqdm = functools.partial(gguf_bar, disable=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        _GGUF.tqdm = gguf_bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        # transformers' switch moves the hub's as well, so the hub's comes last.
        if no_hub_bars:
            disable_progress_bars()
        else:
            enable_progress_bars()
