"""What a model comes with beside weights, config and tokenizer: processors, templates, licences.

They travel as they are, byte for byte: what reads images or sound is the same for the slim model,
and making a processor of them could take libraries that are not here. Names of Python files
(`auto_map`) stay only where the file is in the folder: code that read the model's config is not
what reads the written one, unless it was trusted and its class was written.

Nothing of the code is run here. It is copied where a processor or tokenizer needs it; to run it
or not is decided when that is loaded, as with the source.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmslim.modeling.configuration_llmslim import MODEL_TYPE

from .safetensors_io import objects_in, read_json_if_whole
from .source import LICENCES, Source

PROCESSORS = ("*processor_config.json", "audio_tokenizer_config.json")
LEGACY_TEMPLATE = "chat_template.json"
"""A processor's template as it once was kept; templates of other names beside it are refused."""
TEMPLATES = (LEGACY_TEMPLATE, "chat_template.jinja", "additional_chat_templates/*.jinja")
_TOKENIZER = "tokenizer_config.json"
_CODE = "*.py"


def copy_companions(folder: Path, source: Source | None, *, trusted: bool = False) -> None:
    """Copy what belongs to a model's processors, and drop names of code that is not there.

    Args:
        folder: the checkpoint, with config and tokenizer; what is in it already stays.
        source: the model it was made from.
        trusted: whether the class of the model that was written is in Python files of the source.
    """
    home = source.path if source is not None and source.gguf_file is None else None
    if home is not None:
        for path in _found(home, (*PROCESSORS, *TEMPLATES, *LICENCES)):
            _copy(path, folder / path.relative_to(home))
    if trusted:
        _copy_code(home, folder)
    config = read_json_if_whole(folder / "config.json")
    own = trusted or config.get("model_type") == MODEL_TYPE
    _keep_names(folder / "config.json", _modules(folder) if own else set())
    for path in _found(folder, (_TOKENIZER, *PROCESSORS)):
        entries = [
            one for config in _maps(read_json_if_whole(path)) for one in config["auto_map"].values()
        ]
        if home is not None and any(_modules_of(entry) & {*_modules(home)} for entry in entries):
            _copy_code(home, folder)
        _keep_names(path, _modules(folder))


def _found(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(path for path in folder.glob(pattern) if path.is_file())


def _copy(source: Path, target: Path) -> None:
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())


def _copy_code(home: Path | None, folder: Path) -> None:
    for path in () if home is None else _found(home, (_CODE,)):
        _copy(path, folder / path.name)


def _modules(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob(_CODE)}


def _maps(data: Any) -> list[dict[str, Any]]:
    """Return a config, and every config inside it, that has an `auto_map`."""
    return [item for item in objects_in(data) if isinstance(item.get("auto_map"), dict)]


def _modules_of(entry: Any) -> set[str | None]:
    """Return the stems of the Python files that an entry of an `auto_map` names.

    None stands for what is no file of this folder: `owner/name--file.Class` is of another one.
    """
    found: set[str | None] = set()
    for name in entry if isinstance(entry, list) else [entry]:
        module = name.rpartition(".")[0] if isinstance(name, str) else ""
        if name is not None:
            found.add(module if module.isidentifier() else None)
    return found


def _keep_names(path: Path, modules: set[str]) -> None:
    """Remove from a config's `auto_map` what is not in one of some files, in place."""
    data = read_json_if_whole(path)
    changed = False
    for config in _maps(data):
        named = config.pop("auto_map")
        kept = {auto: entry for auto, entry in named.items() if _modules_of(entry) <= modules}
        changed |= kept != named
        if kept:
            config["auto_map"] = kept
    if changed:
        text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8", newline="\n")
