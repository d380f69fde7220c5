"""What a conversion ends in, known before it begins: config, names, shapes, types, files."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from llmslim import surgery
from llmslim.checkpoint import Layout, Pieces, model_without_weights, quiet
from llmslim.modeling.modeling_llmslim import SlimModelMixin
from llmslim.surgery import Plan


class Outcome:
    """The model that will be written, on the meta device, and its files.

    Args:
        pieces: the model it is made from.
        plan: what is done to it.
        max_shard_size: bytes in one file of weights.
    """

    def __init__(self, pieces: Pieces, plan: Plan, max_shard_size: int) -> None:
        dense, given = pieces.model, pieces.source.given
        dtype = dense.dtype
        changed: Any = model_without_weights(dense.config, dtype, given)
        surgery.finalise(changed, plan)
        self.model: PreTrainedModel = model_without_weights(changed.config, dtype, given)
        if self.model.can_generate():
            self.model.generation_config = copy.deepcopy(dense.generation_config)
        setattr(self.model, "_weight_conversions", pieces.used_conversions)  # noqa: B010
        self.tensors = self._typed(dense.state_dict(), plan)
        """All tensors of the model, in their types."""
        kept = remove_tied_weights_from_state_dict(dict(self.tensors), self.model)
        ignored = self.model._keys_to_ignore_on_save or []
        self._kept = {name: tensor for name, tensor in kept.items() if name not in ignored}
        self.layout = Layout.of(
            self.as_stored(self._kept),
            parameters=self.model.num_parameters(),
            max_shard_size=max_shard_size,
        )

    @property
    def is_slim(self) -> bool:
        """Whether it needs llmslim's classes to load."""
        return isinstance(self.model, SlimModelMixin)

    def as_stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of the model under the names, and in the parts, that files have.

        Args:
            tensors: of one piece at least; names that are not stored are left out.
        """
        wanted = {name: tensor for name, tensor in tensors.items() if name in self._kept}
        if self.is_slim:  # names are the module's own there
            return wanted
        with quiet():
            stored: dict[str, Tensor] = revert_weight_conversion(self.model, wanted)
        return stored

    def _typed(self, dense: dict[str, Tensor], plan: Plan) -> dict[str, Tensor]:
        """Return the model's tensors in the types that the rewritten model has them in."""
        new = {name: plan.new_name(name) for name in dense if not is_dropped(name, plan)}
        types = {new[name]: dense[name].dtype for name in new}
        blocks = {
            f"{site.new_name}.": next(
                tensor.dtype
                for name, tensor in dense.items()
                if name == site.name or name.startswith(f"{site.name}.")
            )
            for site in plan.sites
        }
        typed = {}
        for name, tensor in self.model.state_dict().items():
            dtype = tensor.dtype
            if name in types:
                dtype = types[name]
            elif tensor.is_floating_point():
                block = next((block for block in blocks if name.startswith(block)), None)
                dtype = dtype if block is None else blocks[block]
            typed[name] = tensor.to(dtype)
        return typed


def is_dropped(name: str, plan: Plan) -> bool:
    """Return whether a module or tensor of the source goes with its decoder layer."""
    if plan.layers is None or plan.keep_layers is None:
        return False
    index = plan.layers.index_of(name)
    return index is not None and index not in plan.keep_layers
