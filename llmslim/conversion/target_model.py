"""The model that a conversion will write: config, names, shapes, types and files of its tensors.

Each piece of the model is written to a file, or to several where it is larger than
`max_shard_size`. So a piece is finished when its files are there.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel

from llmslim import editing
from llmslim.compat import as_stored, not_saved, set_conversions, without_ties
from llmslim.editing.plans import Plan
from llmslim.errors import CheckpointError, and_more
from llmslim.modeling.modeling_llmslim import SlimModelMixin
from llmslim.storage import (
    WEIGHTS,
    Piece,
    Pieces,
    check_types,
    model_without_weights,
    quiet,
)


class TargetModel:
    """The model that will be written, on the meta device, and its files.

    Args:
        pieces: the model it is made from.
        plan: what is done to it.
        max_shard_size: bytes in one file of weights.

    Raises:
        CheckpointError: if it has weights of a type that is not written.
    """

    def __init__(self, pieces: Pieces, plan: Plan, max_shard_size: int) -> None:
        dense, given = pieces.model, pieces.source.given
        dtype = dense.dtype
        changed: Any = model_without_weights(dense.config, dtype, given)
        editing.finalise(changed, plan)
        self.model: PreTrainedModel = model_without_weights(changed.config, dtype, given)
        if self.model.can_generate():
            self.model.generation_config = copy.deepcopy(dense.generation_config)
        set_conversions(self.model, pieces.used_conversions)
        self.tensors = self._typed(dense.state_dict(), plan)
        """All tensors of the model, in their types."""
        kept, ignored = without_ties(self.model, self.tensors), not_saved(self.model)
        self._kept = {name: tensor for name, tensor in kept.items() if name not in ignored}
        check_types(self._kept)
        self.files = self._filed(pieces, plan, max_shard_size)
        """By piece and file name; the tensors of each file, by the names they have there."""

    @property
    def weight_bytes(self) -> int:
        """The size of all weights."""
        return sum(tensor.nbytes for tensor in self._kept.values())

    @property
    def index(self) -> str | None:
        """Text of the index of the files; None where there is one file only."""
        map_ = {n: file for files in self.files.values() for file in files for n in files[file]}
        if WEIGHTS in map_.values():
            return None
        about = {"total_parameters": self.model.num_parameters(), "total_size": self.weight_bytes}
        return json.dumps({"metadata": about, "weight_map": map_}, indent=2, sort_keys=True) + "\n"

    def split(self, piece: str, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return what is stored of a piece, by file and by the names that files have.

        Args:
            piece: its name.
            tensors: all that it has in the new model, by their names there.

        Raises:
            CheckpointError: if these are not what the files are to hold.
        """
        made, files = self._stored(tensors), self.files[piece]
        wanted = {name: tensor for group in files.values() for name, tensor in group.items()}
        as_made, as_wanted = (
            {name: (tensor.dtype, tensor.shape) for name, tensor in some.items()}
            for some in (made, wanted)
        )
        if as_made != as_wanted:
            wrong = sorted(name for name, _ in as_made.items() ^ as_wanted.items())
            raise CheckpointError(
                f"{piece}: made with other tensors than the new model has: {and_more(wrong)}. This "
                "is a fault of llmslim; leave these modules out of the recipe."
            )
        return {file: {name: made[name] for name in group} for file, group in files.items()}

    def _stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return those tensors that are stored, under the names and in the parts that files have.

        Args:
            tensors: of one piece at least, by their names in the model.
        """
        wanted = {name: tensor for name, tensor in tensors.items() if name in self._kept}
        if isinstance(self.model, SlimModelMixin):  # names are the module's own there
            return wanted
        with quiet():
            return as_stored(self.model, wanted)

    def _filed(
        self, pieces: Pieces, plan: Plan, max_shard_size: int
    ) -> dict[str, dict[str, dict[str, Tensor]]]:
        """Return what each file of each piece holds."""
        left = [piece for piece in pieces.all if not is_dropped(piece.name, plan)]
        piece_at = {plan.new_name(holder): piece for piece in left for holder in piece.modules}
        tensors: dict[Piece, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in self._kept.items():
            holder = name
            while holder not in piece_at and holder:
                holder = holder.rpartition(".")[0]
            tensors[piece_at[holder]][name] = tensor
        groups: list[tuple[str, dict[str, Tensor]]] = []
        for piece in left:
            stored = self._stored(tensors[piece])
            split = split_torch_state_dict_into_shards(stored, max_shard_size=max_shard_size)
            groups += [
                (piece.name, {name: stored[name] for name in names})
                for names in split.filename_to_tensors.values()
            ]
        files: dict[str, dict[str, dict[str, Tensor]]] = {piece.name: {} for piece in pieces.all}
        for number, (piece_name, group) in enumerate(groups, 1):
            file = f"model-{number:05}-of-{len(groups):05}.safetensors"
            files[piece_name][file if len(groups) > 1 else WEIGHTS] = group
        return files

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
