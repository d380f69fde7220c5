"""What a model comes with beside weights, config and tokenizer: its processors and templates.

They travel as they are, byte for byte: what reads images or sound is the same for the slim model,
and making a processor of them could take libraries that are not here. Names of Python files
(`auto_map`) stay only where the file is in the folder: code that read the model's config is not
what reads the written one, unless it was trusted and its class was written.

Nothing of the code is run here. It is copied where a processor or tokenizer needs it; to run it
or not is decided when that is loaded, as with the source.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmslim.modeling.configuration_llmslim import MODEL_TYPE

from .source import Source

PROCESSORS = ("*processor_config.json", "audio_tokenizer_config.json")
LEGACY_TEMPLATE = "chat_template.json"
"""A processor's template as it once was kept; templates of other names beside it are refused."""
TEMPLATES = (LEGACY_TEMPLATE, "chat_template.jinja", "additional_chat_templates/*.jinja")
_TOKENIZER = "tokenizer_config.json"
_CODE = "*.py"


def bring_companions(folder: Path, source: Source | None, *, trusted: bool = False) -> None:
    """Copy what belongs to a model's processors, and drop names of code that is not there.

    Args:
        folder: the checkpoint, with config and tokenizer; what is in it already stays.
        source: the model it was made from.
        trusted: whether the class of the model that was written is in Python files of the source.
    """
    home = source.path if source is not None and source.gguf_file is None else None
    if home is not None:
        for path in _found(home, (*PROCESSORS, *TEMPLATES)):
            _copy(path, folder / path.relative_to(home))
    if trusted:
        _copy_code(home, folder)
    config = _read(folder / "config.json")
    own = trusted or (isinstance(config, dict) and config.get("model_type") == MODEL_TYPE)
    _keep_names(folder / "config.json", _modules(folder) if own else set())
    for path in _found(folder, (_TOKENIZER, *PROCESSORS)):
        if any(_is_in(home, name) for name in _names(_read(path))):
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


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # as it was in the source, which nobody can use either


def _names(data: Any) -> Iterator[str]:
    """Yield the names of classes that a config's `auto_map` has, those of its parts, too."""
    for part in _parts(data):
        for given in part["auto_map"].values():
            yield from (each for each in _listed(given) if isinstance(each, str))


def _parts(data: Any) -> Iterator[dict[str, Any]]:
    todo = [data]
    while todo:
        item = todo.pop()
        if isinstance(item, Mapping):
            if isinstance(item.get("auto_map"), dict):
                yield item  # type: ignore[misc]
            todo += item.values()
        elif isinstance(item, list):
            todo += item


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def _is_in(home: Path | None, name: str) -> bool:
    module = _module(name)
    return home is not None and module is not None and (home / f"{module}.py").is_file()


def _module(name: str) -> str | None:
    """Return the file's stem, None for code of another repository (`owner/name--file.Class`)."""
    module = name.rpartition(".")[0]
    return None if "--" in name or not module.isidentifier() else module


def _keep_names(path: Path, modules: set[str]) -> None:
    """Take out of a config's `auto_map` what is not in one of some files, in place."""
    data = _read(path)
    changed = False
    for part in list(_parts(data)):
        named = part["auto_map"]
        kept = {
            auto: given
            for auto, given in named.items()
            if all(
                each is None or (isinstance(each, str) and _module(each) in modules)
                for each in _listed(given)
            )
        }
        if kept != named:
            changed = True
            part["auto_map"] = kept
            if not kept:
                del part["auto_map"]
    if changed:
        text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8", newline="\n")
