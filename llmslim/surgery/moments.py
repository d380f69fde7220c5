"""Second moments of activations: of the tokens to fit on, and of those held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmslim.init import GramAccumulator


@dataclass(frozen=True)
class Moments:
    """What a fit looks at, and what it is judged by."""

    fit: GramAccumulator
    held_out: GramAccumulator

    @classmethod
    def of(
        cls, in_features: int, out_features: int | None = None, *, device: torch.device
    ) -> Moments:
        """Return empty ones; arguments as for `GramAccumulator`."""
        judged = out_features is not None
        return cls(
            GramAccumulator(in_features, out_features, device=device),
            GramAccumulator(in_features, out_features, target_moments=judged, device=device),
        )
