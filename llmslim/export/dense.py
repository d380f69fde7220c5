"""Turn a slim model back into an ordinary one of its base class that computes the same.

Each block becomes the dense matrix it equals, worked out in float32 and stored in the model's
type; every other weight is handed over as it is. MLPs of different widths get as many neurons as
the widest one: a neuron of zeros adds nothing to its layer's output, whatever the activation. This
is for runtimes that know the base architecture only (llama.cpp, vLLM, ONNX exporters).

What has no dense equivalent: a block with an activation inside, and a record of an original whose
layers were taken out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Conv1D, PreTrainedConfig, PreTrainedModel

from llmslim.anatomy.sites import Mlp, find_layers, find_mlps
from llmslim.compat import build_from_config, nothing_drawn
from llmslim.errors import CheckpointError
from llmslim.modeling.experts import Experts
from llmslim.modeling.factored import FactoredEmbedding, FactoredHead
from llmslim.modeling.modeling_llmslim import SlimModelMixin, base_of, other_names
from llmslim.modeling.sizes import WIDTH_FIELDS
from llmslim.modeling.structured import StructuredLinear
from llmslim.storage import quiet


@dataclass(frozen=True)
class Weight:
    """A tensor that is worked out when it is needed: models are exported one tensor at a time."""

    shape: tuple[int, ...]
    tensor: Callable[[], Tensor]

    def then(self, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> Weight:
        """Return what a change makes of it, still to be worked out.

        Args:
            shape: of the result.
            change: takes the tensor as it is now.
        """
        tensor = self.tensor
        return Weight(shape, lambda: change(tensor()))


@dataclass(frozen=True)
class PlainModel:
    """An ordinary model as names and weights; its MLPs may be of different widths."""

    base: type[PreTrainedModel]
    config: PreTrainedConfig
    weights: Mapping[str, Weight]
    """By the names of the base class's state dict."""
    skeleton: PreTrainedModel
    """The model that the config describes, on the meta device."""

    def widths(self) -> dict[Mlp, int]:
        """Return the MLPs of the skeleton, and how many neurons the weights have for each."""
        mlps = find_mlps(self.skeleton, find_layers(self.skeleton))
        return {mlp: self._width(mlp) for mlp in mlps}

    def padded(self, widths: Mapping[Mlp, int]) -> dict[str, Weight]:
        """Return the weights with neurons of zeros at the end of MLPs.

        Args:
            widths: neurons wanted for each MLP; one with as many, or more, stays as it is.
        """
        weights = dict(self.weights)
        also = other_names(self.skeleton, {site for mlp in widths for site in (*mlp.up, mlp.down)})
        for mlp, width in widths.items():
            more = width - self._width(mlp)
            if more <= 0:
                continue
            for name in (mlp.down, *also.get(mlp.down, ())):
                axis = self._neurons_axis(mlp.down, up=False)
                weights[f"{name}.weight"] = _with_zeros(weights[f"{name}.weight"], axis, more)
            parts = 2 if mlp.fused else 1
            for name in (each for up in mlp.up for each in (up, *also.get(up, ()))):
                axis = self._neurons_axis(name, up=True)
                weights[f"{name}.weight"] = _with_zeros(
                    weights[f"{name}.weight"], axis, more, parts
                )
                if f"{name}.bias" in weights:
                    weights[f"{name}.bias"] = _with_zeros(weights[f"{name}.bias"], 0, more, parts)
        return weights

    def _width(self, mlp: Mlp) -> int:
        return self.weights[f"{mlp.down}.weight"].shape[self._neurons_axis(mlp.down, up=False)]

    def _neurons_axis(self, site: str, *, up: bool) -> int:
        return int(isinstance(self.skeleton.get_submodule(site), Conv1D) == up)


def plain_model(model: PreTrainedModel) -> PlainModel:
    """Return what a model is as one of its base class; nothing is multiplied out yet.

    Args:
        model: slim or not; it stays as it is, and its weights are shared.

    Raises:
        CheckpointError: if a block has no dense equivalent in the base class.
    """
    if "depth" in getattr(model.config, "llmslim", ()):
        raise CheckpointError(
            f"{type(model).__name__}: keeps layers that its base class builds at other places only "
            "(llmslim.depth in its config); an ordinary checkpoint cannot say so. Keep it slim."
        )
    base, config = base_of(model)
    skeleton = _skeleton(base, config)
    weights = {name: stored(tensor) for name, tensor in model.state_dict().items()}
    sites = list(model.config.llmslim["sites"]) if isinstance(model, SlimModelMixin) else []
    shared = other_names(model, {*sites})
    for name in (each for site in sites for each in (site, *shared.get(site, ()))):
        for key in [key for key in weights if key.startswith(f"{name}.")]:
            del weights[key]
        weights |= _dense(name, model.get_submodule(name), skeleton)
    for one, other in skeleton.all_tied_weights_keys.items() if sites else ():
        both = one in weights and other in weights
        if both and not torch.equal(weights[one].tensor(), weights[other].tensor()):
            config.tie_word_embeddings = False
    order = [*skeleton.state_dict(), *weights]
    weights = {name: weights[name] for name in order if name in weights}
    return PlainModel(base, config, weights, skeleton)


@torch.no_grad()
def dense_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return an ordinary model of the base class with the same function.

    Args:
        model: a slim model; it stays as it is. Weights outside its blocks are shared, not copied.

    Raises:
        CheckpointError: if it is not slim, or a block has no dense equivalent in the base class.
    """
    if not isinstance(model, SlimModelMixin):
        raise CheckpointError(
            f"{type(model).__name__}: not a slim model; an ordinary one needs no export. "
            "Save it as it is."
        )
    plain = plain_model(model)
    config, weights = _fitting(plain)
    with quiet(), nothing_drawn():
        dense: PreTrainedModel = build_from_config(plain.base, config, dtype=model.dtype)
    dense.load_state_dict({name: each.tensor() for name, each in weights.items()}, assign=True)
    dense.tie_weights()
    dense.generation_config = copy.deepcopy(model.generation_config)
    moved: PreTrainedModel = dense.to(model.device).eval()  # type: ignore[arg-type]
    return moved


def _skeleton(base: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    with quiet(), torch.device("meta"):
        return build_from_config(base, copy.deepcopy(config))


def stored(tensor: Tensor) -> Weight:
    """Return a tensor that is there already."""
    return Weight(tuple(tensor.shape), lambda: tensor)


def _with_zeros(weight: Weight, axis: int, more: int, parts: int = 1) -> Weight:
    """Return a weight with zeros at the end of each of the equal parts of an axis."""
    shape = list(weight.shape)
    shape[axis] += parts * more

    def pad(tensor: Tensor) -> Tensor:
        split = tensor.unflatten(axis, (parts, -1))
        behind = [0, 0] * (split.dim() - 2 - axis)  # `pad` counts axes from the last one
        return functional.pad(split, [*behind, 0, more]).flatten(axis, axis + 1)

    return weight.then(tuple(shape), pad)


def _dense(name: str, module: nn.Module, skeleton: nn.Module) -> dict[str, Weight]:
    """Return the weight, and the bias where there is one, of the dense map a block equals.

    Raises:
        CheckpointError: if no dense map equals it.
    """
    dtype = next(module.parameters()).dtype
    if isinstance(module, Experts):
        shape = tuple(skeleton.get_parameter(name).shape)
        return {name: Weight(shape, lambda: copy.deepcopy(module).float().to_dense().to(dtype))}
    if isinstance(module, nn.Linear | Conv1D):
        matrix = stored(module.weight.t() if isinstance(module, Conv1D) else module.weight)
    elif isinstance(module, StructuredLinear):
        shape = (module.out_features, module.in_features)
        matrix = Weight(shape, lambda: _dense_weight(name, module))
    elif isinstance(module, FactoredEmbedding | FactoredHead):
        shape = tuple(skeleton.get_parameter(f"{name}.weight").shape)
        matrix = Weight(shape, lambda: _dense_weight(name, module))
    else:
        raise CheckpointError(f"{name}: {type(module).__name__} has no dense equivalent.")
    transposed = isinstance(skeleton.get_submodule(name), Conv1D)
    weight = matrix.then(
        matrix.shape[::-1] if transposed else matrix.shape,
        lambda tensor: (tensor.t() if transposed else tensor).to(dtype).contiguous(),
    )
    bias = getattr(module, "bias", None)
    return {f"{name}.weight": weight, **({} if bias is None else {f"{name}.bias": stored(bias)})}


@torch.no_grad()
def _dense_weight(name: str, module: StructuredLinear | FactoredEmbedding | FactoredHead) -> Tensor:
    """Return a block's matrix in float32, (O, I); a table's, (number of tokens, hidden size).

    Raises:
        CheckpointError: if it has none.
    """
    block = copy.deepcopy(module).float()
    device = next(block.parameters()).device
    if isinstance(block, StructuredLinear):
        try:
            return block.to_dense()
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}; it cannot be exported.") from error
    if isinstance(block, FactoredEmbedding):
        table: Tensor = block(torch.arange(block.num_embeddings, device=device))
        return table
    columns: Tensor = block(torch.eye(block.in_features, device=device))
    return columns.t()


def _fitting(plain: PlainModel) -> tuple[PreTrainedConfig, Mapping[str, Weight]]:
    """Return the config and the weights, padded if need be, that make one ordinary model.

    Raises:
        CheckpointError: if none does.
    """
    wrong = _misfits(plain.skeleton, plain.weights)
    if not wrong:
        return plain.config, plain.weights
    now = plain.widths()
    for config in _configs(plain, now):
        skeleton = _skeleton(plain.base, config)
        wanted = {mlp.down: mlp.width for mlp in find_mlps(skeleton, find_layers(skeleton))}
        weights = plain.padded({mlp: wanted.get(mlp.down, 0) for mlp in now})
        if not _misfits(skeleton, weights):
            return config, weights
    first = min(wrong)
    shape = list(plain.weights[first].shape) if first in plain.weights else "missing"
    raise CheckpointError(
        f"{first}: {shape}, and {len(wrong) - 1} more weights of sizes that {plain.base.__name__} "
        "does not have, even with neurons of zeros. Keep this one slim."
    )


def _configs(plain: PlainModel, widths: Mapping[Mlp, int]) -> Iterator[PreTrainedConfig]:
    """Yield configs with the width of the widest MLP that changed, then the model's own."""
    changed = [width for mlp, width in widths.items() if width != mlp.width]
    text = plain.config.get_text_config()
    for field in WIDTH_FIELDS if changed else ():
        if hasattr(text, field):
            config = copy.deepcopy(plain.config)
            setattr(config.get_text_config(), field, max(changed))
            yield config
    yield plain.config


def _misfits(skeleton: nn.Module, weights: Mapping[str, Weight]) -> set[str]:
    """Return the names of weights that a model lacks, or has in another shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    return {
        name
        for name in weights.keys() | shapes
        if name not in weights or weights[name].shape != shapes.get(name)
    }
