"""What a conversion layer by layer needs a whole model for.

A model is sampled from, and measured for a budget, as a whole; and a training end to end takes all
of the slim one. Each is loaded for that and released before the next layer is brought in.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch
from transformers import PreTrainedModel

from llmslim import fitting
from llmslim.data import Windows
from llmslim.editing.plans import Plan
from llmslim.recipe import Recipe
from llmslim.storage import check_finite, input_files, load_model

from .conversion_dir import ConversionDir
from .request import Request


class WholeModel:
    """The dense model, loaded where it is first needed; a context, which releases it.

    Args:
        request: the conversion.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._model: PreTrainedModel | None = None

    @property
    def fits(self) -> bool:
        """Whether there is memory for it."""
        files = input_files(self._request.source)
        size = sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
        return size <= fitting.free_memory(self._request.device)

    @property
    def model(self) -> PreTrainedModel:
        """The model, on the device where blocks are fitted."""
        if self._model is None:
            source, options = self._request.source, self._request.options
            self._request.progress(0, 0, "reading the model")
            model = load_model(
                source, dtype=options.dtype, trust_remote_code=options.trust_remote_code
            )
            allowed = options.allow_nonfinite
            check_finite(model.state_dict().items(), source.given, allow_nonfinite=allowed)
            self._model = model.to(self._request.device)  # type: ignore[arg-type]
        return self._model

    def __enter__(self) -> Self:
        """Load nothing yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the model's memory."""
        self._model = None
        if self._request.device.type == "cuda":
            torch.cuda.empty_cache()


def share_out(
    request: Request, plan: Plan, text: Windows, work: ConversionDir, whole: WholeModel
) -> Recipe:
    """Return a plan's recipe with the sizes that its budget comes to, measured once.

    Args:
        request: the conversion.
        plan: of a recipe with rules of `structure: auto`.
        text: to measure on.
        work: where the answer is kept for a conversion that is continued.
        whole: the dense model.
    """
    kept = work.solved()
    if kept is None:
        kept = fitting.allocate(
            whole.model,
            plan.recipe,
            fitting.TokenWindows(text.ids, text.held_out),
            init=request.options.init,
            progress=request.progress,
        )
        work.keep_solved(kept)
    return kept
