"""Check a config.json before transformers builds objects from it.

A config is a page of names and numbers, but some of them make a loader fetch or run things, or
fill the memory before a weight is read: ten thousand million layers are built one by one, a list
of as many labels is written out. What no model needs is refused here, by the key's name, in the
config and in every config inside it.

A model that predicts no tokens is refused, too: without an output head it lacks a weight, and with
a head for another task it would lose what it was trained for. Quantised weights that transformers
cannot unpack on a CPU are refused as well.

Left out: whether the values make a model. That is for transformers to say, and for the files'
tensors, which must fit it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import (  # type: ignore[attr-defined]
    AutoModel,
    FineGrainedFP8Config,
    Mxfp4Config,
)

from llmslim.compat import model_mapping
from llmslim.errors import CheckpointError
from llmslim.modeling.base_class import auto_classes, listed_classes

from .safetensors_io import is_inside, objects_in, read_json_if_whole, read_weights

_LAYERS = re.compile(r"(^|_)n?_?layers?$|(^|_)depths?$")
_PARTS = re.compile(r"_(heads?|experts?|blocks?)$")
_LABELS = re.compile(r"^num_labels$")
_COUNT = re.compile(r"^(num|n)_")
_SIZE = re.compile(r"(_size|_dim|_rank|^[dn]_\w+|_positions?|_embeddings|_length|_channels)$")
_MOST = (
    *((_LAYERS, 1 << 12), (_PARTS, 1 << 16), (_LABELS, 1 << 16)),
    *((_COUNT, 1 << 20), (_SIZE, 1 << 32)),
)
"""What integers may be at most; the first pattern that fits a key holds."""
ADAPTER = "adapter_config.json"
_FETCHES_CODE = ("attn_implementation", "experts_implementation")
_READ = (
    *("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken", "*.spm", "*.safetensors"),
    *("additional_chat_templates", "additional_chat_templates/*"),
)
"""Files that transformers reads by themselves, and may write again into the result."""


_OTHER_HEAD = re.compile(
    r"For\w*(Classification|Answering|MultipleChoice|SentencePrediction|Reward\w*|Regression"
    r"|Retrieval|Detection|Segmentation)$"
)

_READ_PICKLES = {
    "Qwen2_5OmniForConditionalGeneration": (
        "spk_dict.pt",
        "Qwen2_5OmniThinkerForConditionalGeneration",
    )
}
"""Classes whose `from_pretrained` fails without a file that holds neither config nor weights: the
file, and the class of the part that needs none."""
_UNPACKED: Mapping[str, Any] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}


def check_config(config: Mapping[str, Any], where: str | Path) -> None:
    """Refuse a config that would fetch code or weights, or fill the memory.

    Args:
        config: what config.json holds.
        where: the file, for messages.

    Raises:
        CheckpointError: if it has something that is not allowed.
    """
    for key, value in _entries(config):
        if type(value) is int:
            most = next((most for pattern, most in _MOST if pattern.search(key)), None)
            if most is not None and not -most <= value <= most:
                shown = f"{value:,}" if value.bit_length() < 128 else "a number of many digits"
                raise CheckpointError(f"{where}: {key} {shown}; allowed at most {most:,}.")
        name = key.removeprefix("_").removesuffix("_internal")
        if name in _FETCHES_CODE and _names_a_repository(value):
            raise CheckpointError(
                f"{where}: {key} {str(value)[:200]!r} names code on the hub, which is never "
                "fetched for a model. Remove the key."
            )
        if key == "transformers_weights" and value is not None:
            raise CheckpointError(
                f"{where}: transformers_weights names another file of weights; only "
                "model.safetensors, or an index, is read. Rename the file and remove the key."
            )


def check_folder(folder: Path) -> None:
    """Refuse a folder that would make transformers read something else than the folder.

    Raises:
        CheckpointError: if a file in it is a link to somewhere else, or it holds an adapter.
    """
    for path in sorted({path for pattern in _READ for path in folder.glob(pattern)}):
        if path.is_symlink() and not is_inside(path, folder):
            raise CheckpointError(
                f"{path}: a link to a place outside {folder}; a model's files are plain files "
                "inside its folder. Copy it there, or remove it."
            )
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder}: holds an adapter ({ADAPTER}), which would be applied to the "
            "weights on loading. Merge it into the model first (peft: merge_and_unload), or "
            "remove it."
        )


def adapter_note(folder: Path) -> str | None:
    """Return what is wrong with a folder that holds an adapter and no model; None for others.

    Args:
        folder: without a config.json.
    """
    path = folder / ADAPTER
    if not path.is_file() or not is_inside(path, folder):
        return None
    base = read_json_if_whole(path).get("base_model_name_or_path")
    named = isinstance(base, str) and bool(base.strip()) and base.isprintable()
    of = f"of {str(base)[:200]!r}" if named else "of a model that it does not name"
    return (
        f"{folder}: an adapter ({ADAPTER}) {of}, without the model itself; a model folder holds "
        "config.json and the weights. Merge it into that model (peft: merge_and_unload, then "
        "save_pretrained), and give the folder of the merged one."
    )


def check_head(config: Any, folder: Path, given: str) -> None:
    """Refuse a config whose class is known to write no text, or to load a pickle.

    Args:
        config: the model's.
        folder: its files; weights need not be among them.
        given: the model, for messages.

    Raises:
        CheckpointError: if its class has no output head, or one for something else, or cannot be
            loaded without a pickle.
    """
    named = getattr(config, "architectures", None)
    kind = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if _OTHER_HEAD.search(kind):
        raise CheckpointError(
            f"{given}: is a {kind[:80]}, which scores text and writes none; a language model, such "
            "as a ...ForCausalLM, is needed. Give the model that it was trained from."
        )
    if kind in _READ_PICKLES:
        file, part = _READ_PICKLES[kind]
        raise CheckpointError(
            f"{given}: is a {kind}, which loads {file} beside its weights, a pickle; none are read "
            f"or written here. Give the part of it that writes text, saved as {part}."
        )
    if kind and kind in _base_classes(config) and not _has_head(config, folder):
        raise CheckpointError(
            f"{given}: is a {kind[:80]}, which has no output head; a language model, such as a "
            "...ForCausalLM, is needed. Give the whole model, saved with its head."
        )


def _base_classes(config: Any) -> set[str]:
    """Return the names of the classes without a head that a config's type has."""
    kind = type(config)
    if kind not in model_mapping(AutoModel):
        return set()
    # A few types list the class that writes text there, too.
    writing = {cls for auto in auto_classes(kind).values() for cls in listed_classes(auto, kind)}
    return {cls.__name__ for cls in {*listed_classes(AutoModel, kind)} - writing}


def _has_head(config: Any, folder: Path) -> bool:
    """Return whether a head is stored all the same, or is the embedding."""
    text = config.get_text_config()
    if getattr(text, "tie_word_embeddings", False):
        return True
    try:
        entries = read_weights(folder)
    except CheckpointError:
        return False  # none are needed, or `open_source` has refused it
    vocabulary = getattr(text, "vocab_size", None)
    return sum(vocabulary in entry.shape for entry in entries.values()) > 1


def check_quantisation(config: Mapping[str, Any], given: str) -> None:
    """Refuse weights that cannot be unpacked here.

    Args:
        config: what config.json holds.
        given: the model, for messages.

    Raises:
        CheckpointError: if they are quantised in another way.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    for part in parts:
        name = _method(part)
        if name is not None and (name not in _UNPACKED or part is not config):
            raise CheckpointError(
                f"{given}: its weights are quantised ({name[:80]}); only plain weights, GGUF, "
                f"{' and '.join(_UNPACKED)} are read. Use the model it was quantised from, or, "
                "where the library that made it runs, load it with transformers, call "
                "model.dequantize() and model.save_pretrained(FOLDER), and give that folder."
            )


def unpacking(config: Any) -> Any:
    """Return the quantisation config to load with, None for plain weights.

    Args:
        config: the model's.
    """
    name = _method({"quantization_config": getattr(config, "quantization_config", None)})
    return None if name is None else _UNPACKED[name](dequantize=True)


def _method(config: Mapping[str, Any]) -> str | None:
    """Return the name of the method that a config names, None where it names none."""
    method = config.get("quantization_config")
    if not method:
        return None
    if isinstance(method, Mapping):
        method = method.get("quant_method")
    else:
        method = getattr(method, "quant_method", method)
    return str(getattr(method, "value", method))


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, of the config and of all objects inside it."""
    for item in objects_in(config):
        for key, value in item.items():
            yield str(key), value  # numbers, once a config class has read it
            # The numbers of a list go by the list's name.
            numbers = value if isinstance(value, list) else []
            yield from ((str(key), number) for number in numbers if type(number) is int)


def _names_a_repository(value: Any) -> bool:
    names = value.values() if isinstance(value, Mapping) else [value]
    return any(isinstance(name, str) and "/" in name for name in names)
