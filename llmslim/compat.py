"""What llmslim uses of torch and transformers beside their documented interfaces.

All of it is here, or in `modeling/compat.py`, whose names travel inside checkpoints. Each has a
line that says what there is no public way for, and a test in `tests/test_compat.py` that it is
there and does what is relied on; the same file finds private names anywhere else. `scripts/compat`
runs it with the oldest and the newest versions that llmslim may be installed with.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_map as tree_map
from transformers import AttentionInterface, GenerationConfig, modeling_gguf_pytorch_utils
from transformers.cache_utils import DynamicLayer as DynamicLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.initialization import no_init_weights
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import LoadStateDictConfig, remove_tied_weights_from_state_dict

from llmslim.modeling.compat import INITIALIZED
from llmslim.modeling.compat import build_from_config as build_from_config
from llmslim.modeling.compat import mark_initialized as mark_initialized
from llmslim.modeling.compat import model_mapping as model_mapping

# FakeTensorMode: tensors of sizes and no contents, the only way to run a model's code so that
# autograd saves what it would. TorchDispatchMode: sees each operation, which hooks do not.
# tree_map: arguments of an operation have tensors in lists, too. DynamicLayer: the part of a cache
# that keeps all keys and values, known by its class alone.

CAST: Any = torch.ops.aten._to_copy.default
"""The operation behind `Tensor.to`, autocast's copies included."""
READ_NUMBER: Any = torch.ops.aten._local_scalar_dense.default
"""The operation behind `Tensor.item`."""
GROUPED_PRODUCT: Any = torch.ops.aten._grouped_mm.default
"""The operation behind `torch.nn.functional.grouped_mm`."""


@functools.cache
def returns_a_new_tensor(operation: Any) -> bool:
    """Return whether an operation changes none of its arguments and returns no view of one."""
    schema = operation._schema
    return not schema.is_mutable and [each.alias_info for each in schema.returns] == [None]


def changes_arguments(operation: Any) -> bool:
    """Return whether an operation writes to one of its arguments."""
    return bool(operation._schema.is_mutable)


PLAIN_FUNCTIONS: Any = torch._C._disabled_torch_function_impl
"""`__torch_function__` of a class of tensors whose results are ordinary tensors."""


def tensor_of_parts(cls: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a tensor of a class of one's own that has a shape and no memory."""
    return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


TIED_WEIGHTS = "_tied_weights_keys"
"""The private attribute of a model that decides what it computes."""
LOADING_MARKS = (INITIALIZED, "_hf_hook", "_old_forward", "all_tied_weights_keys")
"""Attributes that transformers and accelerate add to modules while a model is loaded."""
CONFIG_ORIGIN = ("_name_or_path", "_commit_hash", "transformers_version")
"""Fields in a config's dictionary that say where it is from, and not what the model is."""
HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks")
"""Tables of a module's hooks: what other libraries registered is removed by no handle of ours."""
CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
"""What switching gradient checkpointing on leaves in modules."""


def cpu_has_amx() -> bool:
    """Return whether the processor multiplies bfloat16 matrices in hardware of their own."""
    return bool(torch.cpu._is_amx_tile_supported())


def cpu_has_avx512_bf16() -> bool:
    """Return whether the processor has AVX-512's instructions for bfloat16."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def unstored_buffers(module: nn.Module) -> set[str]:
    """Return the names of a module's own buffers that its state dict leaves out."""
    return set(module._non_persistent_buffers_set)


def attention_of(config: Any) -> str | None:
    """Return how a model computes attention; only setting it is public."""
    return config._attn_implementation  # type: ignore[no-any-return]


def supports_flash_attention(model: Any) -> bool:
    """Return whether a model's code has a place for FlashAttention."""
    return bool(getattr(model, "_supports_flash_attn", False))


def plain_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """Return the attention in plain products that an attention module's file has, if it has one."""
    # The register of attentions has all but this one, which differs from model to model.
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def register_attention(name: str, attend: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
    """Let models attend by a function that takes masks as plain attention does."""
    AttentionInterface.register(name, attend)
    # Without a mask registered for it an attention gets none; only that register is not exported.
    AttentionMaskInterface.register(name, eager_mask)


def forget_initialized(module: nn.Module) -> None:
    """Take away what `mark_initialized` set on a module, in place."""
    vars(module).pop(INITIALIZED, None)


def not_saved(model: Any) -> set[str]:
    """Return the names of tensors that a model's class leaves out of files."""
    return set(model._keys_to_ignore_on_save or ())


def may_be_missing(model: Any) -> list[str]:
    """Return patterns of tensors that a model's class makes up where files lack them."""
    return list(model._keys_to_ignore_on_load_missing or ())


def may_be_left_over(model: Any) -> list[str]:
    """Return patterns of tensors that a model's class expects in files and does not use."""
    return list(model._keys_to_ignore_on_load_unexpected or ())


def loading_config(model: Any, device: torch.device) -> LoadStateDictConfig:
    """Return how `from_pretrained` would load a model's tensors; `load_tensors` takes it.

    Args:
        model: on the meta device, in the type to load in.
        device: where its tensors are to be.
    """
    return LoadStateDictConfig(
        device_map={"": device},
        dtype=model.dtype,
        dtype_plan=model._get_dtype_plan(model.dtype),
        weight_mapping=conversions(model),
    )


def on_meta(config: LoadStateDictConfig) -> LoadStateDictConfig:
    """Return the same way of loading, without memory for the tensors."""
    return replace(config, device_map={"": "meta"})


def load_tensors(model: Any, tensors: dict[str, Tensor], config: LoadStateDictConfig) -> Any:
    """Load some of a model's tensors, in place; `from_pretrained` knows whole models only.

    Args:
        model: on the meta device, or partly loaded.
        tensors: by their names in the files.
        config: from `loading_config`.

    Returns:
        What transformers found, with the fields `missing_keys`, `mismatched_keys`,
        `conversion_errors` and `error_msgs`.
    """
    return convert_and_load_state_dict_in_model(model, tensors, config)[0]


def conversions(model: Any) -> list[Any]:
    """Return what transformers renames and merges when it loads a model's files."""
    return list(get_model_conversion_mapping(model) or ())


def name_in_model(key: str, mapping: Iterable[Any], prefix: str, known: Mapping[str, Any]) -> str:
    """Return what a model calls a tensor of its files; of several names, the first.

    Args:
        key: the name in the files.
        mapping: from `conversions`.
        prefix: the model's `base_model_prefix`.
        known: the model's state dict.
    """
    mapping = tuple(mapping)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    return rename_source_key(key, renamings, converters, prefix, dict(known))[0]


def set_conversions(model: Any, used: list[Any] | None) -> None:
    """Note what was converted on loading, in place: saving converts it back; None for nothing."""
    model._weight_conversions = used


def as_stored(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return some of a model's tensors under the names and in the parts that its files have.

    Args:
        model: with its conversions noted.
        tensors: by their names in the model.
    """
    stored: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return stored


def without_ties(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that `save_pretrained` writes: of those tied to each other, one."""
    return remove_tied_weights_from_state_dict(dict(tensors), model)


def nothing_drawn() -> AbstractContextManager[None]:
    """Build models without drawing weights while the context lasts; for what is loaded next."""
    return no_init_weights()


def generation_settings(folder: Path) -> GenerationConfig:
    """Return the generation settings in a config.json, as `from_pretrained` makes them of it."""
    return GenerationConfig.from_pretrained(
        folder, config_file_name="config.json", _from_model_config=True
    )


def scaled_rotation(config: Any) -> tuple[Tensor, float]:
    """Return the frequencies of a scaled rotation, (channels / 2), and the factor on its output.

    Args:
        config: of a text model whose `rope_parameters` are one set, and not of type `default`.
    """
    kind = config.rope_parameters["rope_type"]
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, float(factor)


def render_with_answers(
    turns: list[dict[str, Any]], template: str, options: Mapping[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """Render a chat template; `apply_chat_template` gives no places in the text, only tokens.

    Args:
        turns: the conversation.
        template: marks answers by `generation`.
        options: what the template reads besides.

    Returns:
        The text, and where in it each answer starts and ends, in characters.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        conversations=[turns], chat_template=template, return_assistant_tokens_mask=True, **options
    )
    (text,), (spans,) = rendered
    return text, [(int(start), int(end)) for start, end in spans]


@contextmanager
def no_gguf_bar() -> Iterator[None]:
    """Hide the progress bar of reading GGUF, which heeds no setting; nests."""
    module: Any = modeling_gguf_pytorch_utils
    bar = module.tqdm
    module.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        module.tqdm = bar


def use_one_gpu(arguments: Any) -> None:
    """Keep a Trainer of one process on one GPU, in place; it would take the old DataParallel."""
    arguments._n_gpu = min(1, arguments.n_gpu)


def set_train_sampler(trainer: Any, sampler: Callable[..., Any]) -> None:
    """Give a Trainer the order of its rows, in place; it offers two of its own to choose from.

    Args:
        trainer: not training yet.
        sampler: is called with the data set, and returns a sampler.
    """
    trainer._get_train_sampler = sampler


def set_checkpoint_loader(trainer: Any, load: Callable[[Path], None]) -> None:
    """Let a function read a Trainer's weights back, in place: what `save_model` of ours wrote.

    Args:
        trainer: not training yet.
        load: is called with the checkpoint's folder.
    """
    trainer._load_from_checkpoint = lambda folder, model=None: load(Path(folder))  # noqa: ARG005


def after_clipping(trainer: Any, check: Callable[[Any], None]) -> None:
    """Call a function between a Trainer's clipping and its step, in place; no callback stops there.

    Args:
        trainer: not training yet.
        check: is called with the norm of the gradient; what it raises ends the training.
    """
    clip = trainer._clip_grad_norm

    def clip_and_check(model: nn.Module) -> Any:
        norm = clip(model)
        check(norm)
        return norm

    trainer._clip_grad_norm = clip_and_check


def onnx_exporter() -> Callable[[nn.Module, Mapping[str, Any], Mapping[str, Any]], Any]:
    """Return the function that traces a module: its inputs and their dynamic shapes to a graph.

    Its page documents the exporter for models; this takes any module, and gives an `onnx_ir.Model`.

    Raises:
        ImportError: if transformers is older than 5.23, or a package for ONNX is missing.
    """
    from transformers.exporters.base import ExportedModel  # noqa: F401  (new in 5.23)
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    exporter: Any = OnnxExporter()

    def export(module: nn.Module, inputs: Mapping[str, Any], shapes: Mapping[str, Any]) -> Any:
        config = OnnxConfig(
            dynamic_shapes=dict(shapes), prefer_deferred_runtime_asserts_over_guards=True
        )
        return exporter.export(module, dict(inputs), config).program

    return export
