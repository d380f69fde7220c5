"""Turn a slim model back into an ordinary one of its base class that computes the same.

Each block becomes the dense matrix it equals, worked out in float32 and stored in the model's
type; every other weight is handed over as it is. The file grows back to the dense size: this is
for runtimes that know the base architecture only (llama.cpp, vLLM, ONNX exporters).

What has no dense equivalent: a block with an activation inside, and layers of different widths.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Conv1D, PreTrainedConfig, PreTrainedModel

from llmslim.compat import build_from_config, nothing_drawn
from llmslim.errors import CheckpointError
from llmslim.modeling.experts import Experts
from llmslim.modeling.factored import FactoredEmbedding, FactoredHead
from llmslim.modeling.modeling_llmslim import SlimModelMixin, base_of, other_names
from llmslim.modeling.sizes import WIDTH_FIELDS
from llmslim.modeling.structured import StructuredLinear

from .source import quiet


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
    if "depth" in model.config.llmslim:
        raise CheckpointError(
            f"{type(model).__name__}: keeps layers that its base class builds at other places only "
            "(llmslim.depth in its config); an ordinary checkpoint cannot say so. Keep it slim."
        )
    base, config = base_of(model)
    skeleton = _skeleton(base, config)
    state = dict(model.state_dict())
    sites = model.config.llmslim["sites"]
    shared = other_names(model, set(sites))
    for name in (each for site in sites for each in (site, *shared.get(site, ()))):
        for key in [key for key in state if key.startswith(f"{name}.")]:
            del state[key]
        module = model.get_submodule(name)
        if isinstance(module, Experts):
            stack = copy.deepcopy(module).float()
            state[name] = stack.to_dense().to(module.dtype)
            continue
        transposed = isinstance(skeleton.get_submodule(name), Conv1D)
        state |= _dense_state(name, module, transposed)
    for one, other in skeleton.all_tied_weights_keys.items():
        if one in state and other in state and not torch.equal(state[one], state[other]):
            config.tie_word_embeddings = False
    config = _fitting_config(base, config, state)
    with quiet(), nothing_drawn():
        dense: PreTrainedModel = build_from_config(base, config, dtype=model.dtype)
    dense.load_state_dict(state, assign=True)
    dense.tie_weights()
    dense.generation_config = copy.deepcopy(model.generation_config)
    moved: PreTrainedModel = dense.to(model.device).eval()  # type: ignore[arg-type]
    return moved


def _skeleton(base: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    with quiet(), torch.device("meta"):
        return build_from_config(base, copy.deepcopy(config))


def _dense_state(name: str, module: nn.Module, transposed: bool) -> dict[str, Tensor]:
    """Return the weight, and the bias where there is one, of the dense map a block equals.

    Raises:
        CheckpointError: if no dense map equals it.
    """
    if isinstance(module, nn.Linear | Conv1D):
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
    else:
        weight = _dense_weight(name, module)
    dtype = next(module.parameters()).dtype
    state = {f"{name}.weight": (weight.t() if transposed else weight).to(dtype).contiguous()}
    bias = getattr(module, "bias", None)
    return state if bias is None else {**state, f"{name}.bias": bias}


def _dense_weight(name: str, module: nn.Module) -> Tensor:
    """Return a block's matrix in float32, shaped as the base class's weight.

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
    if isinstance(block, FactoredHead):
        columns: Tensor = block(torch.eye(block.in_features, device=device))
        return columns.t()
    raise CheckpointError(f"{name}: {type(module).__name__} has no dense equivalent.")


def _fitting_config(
    base: type[PreTrainedModel], config: PreTrainedConfig, state: dict[str, Tensor]
) -> PreTrainedConfig:
    """Return the config, its MLP width corrected if need be, that makes the base class fit.

    Raises:
        CheckpointError: if no single width does.
    """
    wanted = {key: tensor.shape for key, tensor in state.items()}

    def misfits(trial: PreTrainedConfig) -> set[str]:
        shapes = {k: t.shape for k, t in _skeleton(base, trial).state_dict().items()}
        return {key for key in wanted.keys() | shapes if wanted.get(key) != shapes.get(key)}

    wrong = misfits(config)
    if not wrong:
        return config
    sizes = sorted({size for key in wrong for size in wanted.get(key, ())})
    text = config.get_text_config()
    for field in WIDTH_FIELDS:
        for size in sizes if hasattr(text, field) else ():
            trial = copy.deepcopy(config)
            setattr(trial.get_text_config(), field, size)
            if not misfits(trial):
                return trial
    first = min(wrong)
    shape = list(wanted[first]) if first in wanted else "missing"
    raise CheckpointError(
        f"{first}: {shape}, and {len(wrong) - 1} more weights of sizes that {base.__name__} does "
        "not have; an ordinary checkpoint needs one width for all layers and a config field for "
        "it. Keep this one slim."
    )
