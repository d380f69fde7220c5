"""Write a causal language model as ONNX, for onnxruntime and what is built on it.

transformers' exporter traces the model with torch.export and hands it to torch.onnx. There is one
graph for a prompt and for the tokens after it: it takes the keys and values of all tokens before,
none at first, and returns them with those of the new ones. Positions are counted in the graph, from
the attention mask, so prompts may be padded on the left.

Inputs:  input_ids (B, N), attention_mask (B, P + N), past_key_values.I.key and .value (B, H, P, D)
Outputs: logits (B, N, V), present.I.key and .value (B, H, P + N, D)

Shapes: B = batch, N = new tokens, P = tokens before, H = key heads, D = channels of a head,
V = vocabulary, I = layer. Layers with a window keep all tokens; the mask has the window.

Weights and values are float32: onnxruntime's CPU kernels want that, and so do its quantisers.
"""

from __future__ import annotations

import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmslim.atomic import staged
from llmslim.compat import DynamicLayer, onnx_exporter
from llmslim.errors import CheckpointError
from llmslim.modeling.experts import Experts
from llmslim.modeling.modeling_llmslim import base_of
from llmslim.storage import (
    Source,
    check_target,
    first_line,
    flush_all,
    quiet,
    write_companions,
    write_manifest,
)

FILE = "model.onnx"
REMEDY = "Try llmslim export --dense first, and export the result."
_ONE_FILE_BYTES = 2**30 * 3 // 2
"""More weights are in a file beside it: one of protobuf ends at 2 GiB, and the graph needs room."""
_CLOSE = 1e-3
"""Largest difference of logits, as a share of the largest of them."""


def check_onnx_export(out: Path, *, overwrite: bool = False) -> None:
    """Refuse what cannot be written, before any work is done for it.

    Args:
        out: the folder to write.
        overwrite: whether a folder that is there already may be replaced.

    Raises:
        CheckpointError: if the folder cannot be there, or a package is missing.
    """
    check_target(out, overwrite)
    try:
        with quiet():
            onnx_exporter()
    except ImportError as error:
        raise CheckpointError(
            f"{out}: writing ONNX needs the packages onnx and onnxscript, and transformers "
            f"5.23 ({first_line(error)}). Run pip install 'llmslim-toolkit[onnx]'."
        ) from error


@torch.no_grad()
def write_onnx(
    model: PreTrainedModel,
    out: Path,
    *,
    source: Source | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder with the graph, the base class's config and the tokenizer.

    It appears only when it is complete, has passed onnx's checker and, where onnxruntime is
    installed, has given the model's logits for a prompt and the token after it.

    Args:
        model: slim or not, in float32 and in evaluation mode; it stays as it is.
        out: the folder, as `check_onnx_export` accepted it.
        source: what the model was loaded from.
        tokenizer: saved beside the graph.
        overwrite: whether a folder that is there already may be replaced.

    Raises:
        CheckpointError: if the model cannot be exported, or what was exported computes something
            else.
    """
    import onnx
    import onnx_ir

    traced = _WithCache(model)
    graph = _export(traced)
    weights = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    with staged(out, overwrite) as partial:
        file = partial / FILE
        beside = FILE.replace(".onnx", ".onnx_data") if weights > _ONE_FILE_BYTES else None
        onnx_ir.save(graph, file, external_data=beside)
        with quiet():
            _plain_config(model).save_pretrained(partial)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(partial)
        write_companions(partial, source=source, tokenizer=tokenizer)
        try:
            onnx.checker.check_model(file)
        except onnx.checker.ValidationError as error:
            raise CheckpointError(_why(model, error)) from error
        check_same_in_onnxruntime(model, file)
        write_manifest(partial, source=source)
        flush_all(partial)
    return out


@torch.no_grad()
def check_same_in_onnxruntime(model: PreTrainedModel, file: Path) -> None:
    """Run a file on two prompts, one padded, and on a token after each, if onnxruntime is there.

    Args:
        model: what it was made of.
        file: the graph.

    Raises:
        CheckpointError: if it does not run, or its logits are not the model's.
    """
    try:
        import onnxruntime
    except ImportError:
        return
    try:
        far = _difference(_WithCache(model), file)
    except Exception as error:  # onnxruntime's classes are of its C++ part
        raise CheckpointError(
            f"{file.name}: onnxruntime {onnxruntime.__version__} does not run it "
            f"({first_line(error)}); nothing was written. {REMEDY}"
        ) from error
    if not far <= _CLOSE:
        raise CheckpointError(
            f"{file.name}: onnxruntime's logits differ from the model's by {far:.2g} of the "
            f"largest one; nothing was written. {REMEDY}"
        )


def _difference(traced: _WithCache, file: Path) -> float:
    """Return the largest difference of logits, as a share of the largest of them."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    ids = torch.arange(1, 13).reshape(2, 6) % traced.config.vocab_size
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    there = past = traced.empty(2)
    far = []
    for tokens in (slice(0, 5), slice(5, 6)):
        new, seen = ids[:, tokens], mask[:, : tokens.stop]
        wanted, *past = traced(new, seen, past).values()
        feed = zip(traced.inputs, (new, seen, *there), strict=True)
        found = session.run(None, {name: tensor.numpy() for name, tensor in feed})
        logits, *there = (torch.from_numpy(one) for one in found)
        real = seen[:, tokens].bool()
        far.append((wanted - logits)[real].abs().max() / wanted[real].abs().max())
    return float(torch.stack(far).max())  # NaN if there is one


class _WithCache(nn.Module):
    """A model that takes and returns its cache as plain tensors.

    Raises:
        CheckpointError: if it cannot be exported.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        check_model(model)
        cache = DynamicCache()
        try:
            model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        except Exception as error:  # whatever a model's own code raises
            raise CheckpointError(_why(model, error)) from error
        if not all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers):
            raise CheckpointError(
                f"{type(model).__name__}: keeps something else than keys and values of all layers "
                "between tokens, which is not written as ONNX here."
            )
        self.shapes = [tensor.shape for tensor in _tensors(cache)]
        names = [f"{i}.{part}" for i in range(len(cache.layers)) for part in ("key", "value")]
        past = (f"past_key_values.{name}" for name in names)
        self.inputs = ("input_ids", "attention_mask", *past)
        self.outputs = ("logits", *(f"present.{name}" for name in names))
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def empty(self, batch: int, length: int = 0) -> list[Tensor]:
        """Return a cache of zeros."""
        return [torch.zeros(batch, heads, length, size) for _, heads, _, size in self.shapes]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]
    ) -> dict[str, Tensor]:
        """Return logits, keys and values by their names in the graph."""
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(key, value, layer)
        options = {}
        if self.takes_positions:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -input_ids.shape[1] :]
        result = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        return dict(zip(self.outputs, (result.logits, *_tensors(cache)), strict=True))


def check_model(model: PreTrainedModel) -> None:
    """Refuse what is known to have no ONNX form.

    Raises:
        CheckpointError: with the module's name.
    """
    for name, module in model.named_modules():
        if isinstance(module, Experts) and not module.takes_rows:
            raise CheckpointError(
                f"{name}: blocks of {module.block_spec['structure']} run in a Python loop over the "
                f"experts that the text needs, which a graph cannot hold. {REMEDY}"
            )
    if not model.can_generate() or model.config.get_text_config() is not model.config:
        raise CheckpointError(
            f"{type(model).__name__}: not a causal language model of text alone, the only kind "
            "that is written as ONNX here."
        )


def _tensors(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _export(traced: _WithCache) -> Any:
    """Return the graph, an `onnx_ir.Model`.

    Raises:
        CheckpointError: if there is none.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from torch.export import Dim

    batch, new, before = (Dim(name) for name in ("batch", "new", "before"))
    # Sizes of 0 and 1 would be taken for constants.
    past = traced.empty(2, 3)
    inputs: Any = {
        "input_ids": torch.ones(2, 5, dtype=torch.long),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "past": past,
    }
    shapes = {
        "input_ids": {0: batch, 1: new},
        "attention_mask": {0: batch, 1: Dim.AUTO},
        "past": [{0: batch, 2: before} for _ in past],
    }
    try:
        with _silent():
            graph = onnx_exporter()(traced, inputs, shapes)
    except Exception as error:  # torch's and onnxscript's errors are of many classes
        raise CheckpointError(_why(traced.model, error)) from error
    for value, name in zip(graph.graph.inputs, traced.inputs, strict=True):
        value.name = name
    _name_sizes(graph.graph)
    ClearMetadataAndDocStringPass()(graph)  # lines and paths of the code that was traced
    return graph


def _name_sizes(graph: Any) -> None:
    """Give the sizes that are free the names that optimum uses, in place.

    Sizes that only data decide, such as the number of an expert's tokens, have no name and get
    none: onnxruntime takes two sizes of one name for equal.
    """
    import onnx_ir

    ids, mask, past = (value.shape for value in graph.inputs[:3])
    sizes = {
        str(ids[0]): "batch_size",
        str(ids[1]): "sequence_length",
        str(past[2]): "past_sequence_length",
        str(mask[1]): "total_sequence_length",
    }
    values = [value for node in graph.all_nodes() for value in node.outputs]
    for value in (*graph.inputs, *values):
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                size
                if isinstance(size, int) or size.value is None
                else re.sub(r"\w+", lambda word: sizes.get(word[0], word[0]), str(size))
                for size in value.shape
            )


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what exporting prints, logs and warns of from the user."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with quiet(), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _plain_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return a config of the base class: programs that run the graph know no other."""
    config: PreTrainedConfig
    base, config = base_of(model)
    record = getattr(model.config, "llmslim", {}).get("depth", {"original": ()})
    for field in record["original"]:  # the graph has the layers that were kept
        setattr(config, field, getattr(model.config, field))
    config.architectures = [base.__name__]
    config.dtype = model.dtype
    return config


def _why(model: PreTrainedModel, error: Exception) -> str:
    return f"{type(model).__name__}: cannot be written as ONNX ({first_line(error)}). {REMEDY}"
