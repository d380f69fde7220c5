"""What a model's publisher says of it: licence, languages, name on the hub.

Read from the front matter of the model's card (README.md) or the metadata of its GGUF file, both of
which anyone may have written: what is no plain text of the expected form counts as not said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmslim.options import without_folder

from .safetensors_io import hub_snapshot
from .source import CARD, Source

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""A model's name on the hub, with its owner."""
_TERMS = ("license", "license_name", "license_link")
_ON_THE_HUB = re.compile(rf"https://huggingface\.co/({HUB_ID.pattern})/?")


@dataclass(frozen=True)
class Origin:
    """The fields of a card that a model made of this one shares, each empty if unknown."""

    name: str = ""
    """Of the model itself, on the hub."""
    base_model: str = ""
    """Name on the hub of the model that it was made from."""
    terms: Mapping[str, str] | None = None
    """`license`, and `license_name` and `license_link` of one that has no short name."""
    languages: tuple[str, ...] = ()

    def front_matter(self) -> dict[str, Any]:
        """Return terms and languages as a card's front matter has them."""
        languages = {"language": [*self.languages]} if self.languages else {}
        return {**(self.terms or {}), **languages}


def origin_of(source: Source | None) -> Origin:
    """Return what is known of a model's origin.

    Args:
        source: the model that was found; None for one in memory.
    """
    if source is None or source.path is None:
        return Origin()
    if source.gguf_file is not None:
        return _of_gguf(source.path / source.gguf_file)
    local = Path(source.given).exists()
    snapshot = hub_snapshot(source.path.resolve()) if local else None
    name = source.given
    if local:
        name = "" if snapshot is None else _hub_name(snapshot.parents[1].name)
    return _origin(name, read_front_matter(source.path))


def published_name(source: Source) -> str:
    """Return a name by which others find a model: on the hub with its commit, or a local path.

    Args:
        source: the model that was found.
    """
    place = source.path.resolve() if source.path else Path()
    owned = place.parents[1].name if hub_snapshot(place) == place else ""
    if owned.startswith("models--") and source.gguf_file is None:
        return f"{_hub_name(owned)}@{place.name}"
    return without_folder(source.given)


def read_front_matter(folder: Path) -> dict[str, Any]:
    """Return the front matter of the card in a folder; empty where there is none."""
    try:
        parts = (folder / CARD).read_text(encoding="utf-8").split("---\n", 2)
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _hub_name(folder: str) -> str:
    """Return the name of the model that a folder of the hub's cache holds."""
    return folder.removeprefix("models--").replace("--", "/")


def _origin(name: str, front: Mapping[str, Any]) -> Origin:
    base = front.get("base_model")
    [base] = base if isinstance(base, list) and len(base) == 1 else [base]
    languages = front.get("language")
    languages = languages if isinstance(languages, list) else [languages]
    return Origin(
        name if HUB_ID.fullmatch(name) else "",
        base if isinstance(base, str) and HUB_ID.fullmatch(base) else "",
        {key: front[key] for key in _TERMS if isinstance(front.get(key), str)},
        tuple(one for one in languages if isinstance(one, str)),
    )


def _of_gguf(path: Path) -> Origin:
    from gguf import GGUFReader  # the config was read with it

    fields = GGUFReader(path).fields

    def value(key: str) -> Any:
        return fields[f"general.{key}"].contents() if f"general.{key}" in fields else None

    def hub_name(key: str) -> str:
        match = _ON_THE_HUB.fullmatch(str(value(key)))
        return match[1] if match else ""

    front = {key: value(key.replace("_", ".", 1)) for key in _TERMS}
    front |= {"language": value("languages"), "base_model": hub_name("base_model.0.repo_url")}
    return _origin(hub_name("source.repo_url") or hub_name("repo_url"), front)
