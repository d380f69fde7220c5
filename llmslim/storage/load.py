"""Load a model or a tokenizer whose files were found and checked.

GGUF weights are unpacked to plain dense ones. A weight that the model needs and the files do not
hold is an error here; transformers would draw a random one and only log it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmslim.compat import conversions, may_be_left_over, name_in_model, set_conversions
from llmslim.errors import CheckpointError, and_more
from llmslim.modeling.base_class import auto_class_of
from llmslim.modeling.configuration_llmslim import register
from llmslim.options import long_dtype

from .config import unpacking
from .finite import check_finite
from .kphi3 import load_kphi3
from .safetensors_io import FLOATS, Entry, read_weights
from .source import Source, empty_model, first_line, quiet

DTYPES = ("float32", "bfloat16", "float16")
"""Types that a model may be loaded in."""

_SLACK = 4
"""Times the stored weights: tied weights, tables and masks are computed rather than stored."""
_BUFFERS = 1 << 26
_TABLES = re.compile(r"rotary_emb\.inv_freq$|\.(masked_bias|attn\.bias)$")
"""Tables that old checkpoints store, and models compute."""

_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "tokenizer_config.json")


def load_model(
    source: Source, *, dtype: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a model in eval mode on the CPU.

    Args:
        source: from `open_source`.
        dtype: float32, bfloat16 or float16; by default the type its weights are stored in
            (GGUF: float32), where they are of several types or quantised the one config.json
            names, as long as that loses nothing.
        trust_remote_code: as for `open_source`.

    Raises:
        CheckpointError: if the files cannot be loaded, or do not hold every weight of the model.
    """
    check_dtype(dtype)
    if source.path is None:
        raise CheckpointError(f"{source.given}: has no folder to load weights from.")
    if source.is_kphi3:
        with quiet():
            return load_kphi3(source.path, dtype=dtype)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.gguf_file is not None:
        options |= {
            "gguf_file": source.gguf_file,
            "quantization_config": GgufConfig(dequantize=True),
            "dtype": dtype or "float32",
        }
        return _from_pretrained(source, options)
    entries = read_weights(source.path)
    empty = check_size(source, entries, trust_remote_code)
    options["use_safetensors"] = True
    quantisation = unpacking(source.config)
    if quantisation is not None:
        wanted = dtype or getattr(source.config, "dtype", None) or "bfloat16"
        model = _from_pretrained(
            source, {**options, "quantization_config": quantisation, "dtype": wanted}
        )
        for parameter in model.parameters():  # some are unpacked in the type of their scales
            parameter.data = parameter.data.to(model.config.dtype)
        set_conversions(model, None)  # transformers would pack them again on saving
        return model
    chosen = dtype or dtype_of_weights(source.given, entries)
    refuse_other_kinds(source.given, empty, entries, names_in_model(empty, entries))
    model = _from_pretrained(source, {**options, "dtype": chosen or "auto"})
    if chosen is None and (exact := loses_values(model, entries)):
        return _from_pretrained(source, {**options, "dtype": exact})
    return model


def check_dtype(dtype: str | None) -> None:
    """Refuse a type that no model may be loaded or made in.

    Args:
        dtype: its name, None for whatever the model has.

    Raises:
        CheckpointError: if it is none of `DTYPES`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype: {dtype!r}; allowed {', '.join(DTYPES)}.")


def load_finite(
    source: Source, *, dtype: str | None = None, allow_nonfinite: bool = False
) -> PreTrainedModel:
    """Load a model, and refuse weights that are NaN or infinite.

    Args:
        source: the model that was found.
        dtype: as for `load_model`, also by its short name.
        allow_nonfinite: accept such weights.

    Raises:
        CheckpointError: if it cannot be loaded, or has such weights.
    """
    model = load_model(source, dtype=long_dtype(dtype))
    check_finite(model.state_dict().items(), source.given, allow_nonfinite=allow_nonfinite)
    return model


def load_tokenizer(
    source: Source | str | Path, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """Load a model's tokenizer with its chat template; None where the folder has none.

    Args:
        source: from `open_source`, or a folder or .gguf file.
        trust_remote_code: as for `open_source`.

    Raises:
        CheckpointError: if there is no such folder, or its tokenizer files cannot be read.
    """
    if isinstance(source, Source):
        folder, gguf_file, given = source.path, source.gguf_file, source.given
    else:
        path = Path(source).expanduser()
        given = str(source)
        folder, gguf_file = (path.parent, path.name) if path.is_file() else (path, None)
    if folder is None or not folder.is_dir():
        raise CheckpointError(f"{given}: no such folder.")
    if gguf_file is None and not any(any(folder.glob(name)) for name in _TOKENIZER_FILES):
        return None
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    register()
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, **options
            )
    except Exception as error:  # whatever hostile or unusual files make of the readers
        raise CheckpointError(
            f"{given}: its tokenizer cannot be loaded ({first_line(error)})."
        ) from error
    for passing in ("is_local", "local_files_only"):  # how it was loaded; would be saved with it
        tokenizer.init_kwargs.pop(passing, None)
    return tokenizer


def check_size(
    source: Source, entries: Mapping[str, Entry], trust_remote_code: bool
) -> PreTrainedModel:
    """Compare the size of the model that the config describes with what the files hold.

    transformers takes memory for what the files lack before it reports it. Which tensors are
    lacking is an error after loading; this is about a config that describes a thousand times as
    much as the files hold.

    Returns:
        That model, on the meta device.

    Raises:
        CheckpointError: if the model is far larger, or cannot be built at all.
    """
    stored = sum(prod(entry.shape) for entry in entries.values())
    model = empty_model(source.config, source.given, trust_remote_code=trust_remote_code)
    needed = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    if needed > _SLACK * stored + _BUFFERS:
        raise CheckpointError(
            f"{source.given}: config.json describes a model of {needed:,} weights; its files hold "
            f"{stored:,}. Download config.json and weights from one place."
        )
    return model


def names_in_model(
    model: PreTrainedModel, entries: Iterable[str], mapping: Iterable[Any] | None = None
) -> dict[str, str]:
    """Return the model's (first) name for every stored tensor that it has a use for.

    Args:
        model: on any device.
        entries: names in the files.
        mapping: what transformers renames and merges on loading; worked out where not given.
    """
    mapping = conversions(model) if mapping is None else list(mapping)
    known, prefix = model.state_dict(), model.base_model_prefix
    names = {}
    for key in entries:
        name = name_in_model(key, mapping, prefix, known)
        if name not in known and key in known:
            name = name_in_model(key, (), prefix, known)
        if name in known:
            names[key] = name
    return names


def refuse_other_kinds(
    given: str, model: PreTrainedModel, entries: Mapping[str, Entry], names: Mapping[str, str]
) -> None:
    """Refuse weights stored as integers or complex numbers where the model has real ones.

    Loading would turn them into others: codes of a quantisation that config.json does not name.

    Args:
        given: the model, for messages.
        model: on any device.
        entries: what its files hold.
        names: what the model calls them.

    Raises:
        CheckpointError: if there are any.
    """
    wanted = model.state_dict()
    wrong = sorted(
        key
        for key, name in names.items()
        if wanted[name].is_floating_point() and entries[key].dtype not in FLOATS
    )
    if wrong:
        raise CheckpointError(
            f"{given}: {and_more(wrong)} stored as {entries[wrong[0]].dtype}; allowed "
            f"{', '.join(FLOATS)}. Use the model that they were made from."
        )


def unused_notes(
    source: Source, model: PreTrainedModel, unused: Iterable[str] | None = None
) -> tuple[str, ...]:
    """Return a note on stored tensors that a model does not use, beside those its class leaves out.

    Args:
        source: the model's files.
        model: the one that its config describes, on any device.
        unused: names of such tensors, where they are known already.

    Returns:
        A sentence for the report, where there are any.
    """
    if source.path is None or source.gguf_file is not None or unpacking(source.config) is not None:
        return ()
    if unused is None:
        entries = read_weights(source.path)
        unused = entries.keys() - names_in_model(model, entries)
    ignored = [*map(re.compile, may_be_left_over(model)), _TABLES]
    useless = sorted(key for key in unused if not any(each.search(key) for each in ignored))
    if not useless:
        return ()
    count = f"{len(useless)} stored tensors are" if len(useless) > 1 else "1 stored tensor is"
    return (
        f"{source.given}: {count} of no use to {type(model).__name__}, such as {useless[0]}; "
        "they are not in the result.",
    )


def type_notes(source: Source, written: torch.dtype, dtype: str | None) -> tuple[str, ...]:
    """Return a note where weights of several types are written in the widest of them.

    Args:
        source: the model's files.
        written: the type of the result.
        dtype: the type that the caller chose, if any.

    Returns:
        A sentence for the report, where some weights become larger than they were.
    """
    plain = source.path is not None and source.gguf_file is None and not source.is_kphi3
    if dtype is not None or not plain or unpacking(source.config) is not None:
        return ()
    assert source.path is not None
    stored = {entry.dtype for entry in read_weights(source.path).values()} & FLOATS.keys()
    if all(getattr(torch, FLOATS[dtype]).itemsize >= written.itemsize for dtype in stored):
        return ()
    return (
        f"{source.given}: its weights are of types {', '.join(sorted(stored))}; written as "
        f"{str(written).removeprefix('torch.')}, which holds them all. Pass dtype (--dtype) for "
        "another.",
    )


def _from_pretrained(source: Source, options: dict[str, Any]) -> PreTrainedModel:
    """Load, and hold the result against what the model needs.

    Raises:
        CheckpointError: if loading fails or leaves a weight out.
    """
    register()
    try:
        with quiet():
            trusted = options.get("trust_remote_code", False)
            loader = auto_class_of(source.config, trust_remote_code=trusted)
            model, info = loader.from_pretrained(source.path, output_loading_info=True, **options)
    except Exception as error:  # config and model classes fail each in their own way
        raise CheckpointError(
            f"{source.given}: cannot be loaded as a causal language model ({first_line(error)})."
        ) from error
    refuse_absent(
        source.given, {*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])}
    )
    loaded: PreTrainedModel = model.eval()
    return loaded


def refuse_absent(given: str, names: Iterable[str]) -> None:
    """Refuse files that lack weights, or have them in another shape.

    Args:
        given: the model, for messages.
        names: those weights; none is fine.

    Raises:
        CheckpointError: if there are any.
    """
    absent = sorted(names)
    if absent:
        raise CheckpointError(
            f"{given}: {len(absent)} weights of the model are missing or of another shape, "
            f"such as {absent[0]}; every weight must be there. Download the model again."
        )


def dtype_of_weights(given: str, entries: Mapping[str, Entry]) -> str | None:
    """Return the type that all stored floating-point weights have, None if they have several.

    Args:
        given: the model, for messages.
        entries: what its files hold.

    Raises:
        CheckpointError: if there are none, or some are of a type only quantised models have.
    """
    found = {entry.dtype for entry in entries.values() if entry.dtype.startswith(("F", "BF"))}
    if not found or not found <= set(FLOATS):
        raise CheckpointError(
            f"{given}: weights of type {', '.join(sorted(found - set(FLOATS))) or 'integer'}; "
            f"allowed {', '.join(FLOATS)}."
        )
    return FLOATS[found.pop()] if len(found) == 1 else None


def loses_values(model: PreTrainedModel, entries: Mapping[str, Entry]) -> str | None:
    """Return the type to load in, where the model's cannot hold all values that are stored.

    Args:
        model: loaded, or on the meta device, in the type that its config names.
        entries: what its files hold.
    """
    widths = {name: torch.finfo(getattr(torch, dtype)).bits for name, dtype in FLOATS.items()}
    for name, tensor in model.state_dict().items():
        stored = entries[name].dtype if name in entries else ""
        other = stored in FLOATS and tensor.dtype != getattr(torch, FLOATS[stored])
        if other and torch.finfo(tensor.dtype).bits <= widths[stored]:
            wide = any(entry.dtype == "F64" for entry in entries.values())
            return "float64" if wide else "float32"
    return None
