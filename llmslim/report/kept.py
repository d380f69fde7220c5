"""Files of JSON that commands keep beside a checkpoint: read back and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llmslim.errors import CheckpointError


def read_kept(path: Path, kind: Any, command: str) -> Any:
    """Return what a file holds, None where there is no such file.

    Args:
        path: the file.
        kind: type of what it holds.
        command: that writes it, for messages.

    Raises:
        CheckpointError: if it holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Remove it.") from error
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise CheckpointError(
            f"{path}: {where}: {first['msg']}; this is not what {command} writes. Remove it."
        ) from error
