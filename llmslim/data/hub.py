"""Read the rows of a data set on the hub: downloaded, or streamed where it is large.

A name is `owner/name`, `name:config` or `name:config:split`; the split is `train` if none is given.
Names, proxies, offline mode and wrong splits raise many classes of exceptions in `datasets`; here
each becomes one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from llmslim.errors import DataError

SHORT_NAMES = {"lamini": "MBZUAI/LaMini-instruction"}
HUB_NAME = re.compile(
    r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<config>[^:]*))?(?::(?P<split>.+))?"
)


class HubInfo(NamedTuple):
    """What is known about a data set before its rows are read."""

    key: str
    """Changes with the data set's revision."""
    size_bytes: int | None
    """Of the download, None if unknown."""
    licence: str
    """As its card names it, or where to look it up."""


def hub_name(given: str) -> str:
    """Return a data set's name on the hub; empty where it has no owner, as files and `self`."""
    match = HUB_NAME.fullmatch(SHORT_NAMES.get(given, given))
    return match["name"] if match and "/" in match["name"] and not Path(given).exists() else ""


def stream_rows(given: str, seed: int) -> Iterator[Mapping[str, Any]]:
    """Stream a data set, its files in random order.

    Raises:
        DataError: if there is none of that name, or the hub cannot be reached.
    """
    from datasets import load_dataset

    name, config, split = _parts(given)
    with _as_data_error(given):
        stream = load_dataset(name, config, split=split, streaming=True)
        # The callers' buffer is bounded in characters; this draws the order of the files.
        yield from stream.shuffle(seed=seed % 2**32, buffer_size=1)


def downloaded_rows(given: str) -> tuple[int, Iterator[Mapping[str, Any]]]:
    """Download a data set into the hub's cache; return its number of rows, and the rows in order.

    Raises:
        DataError: if there is none of that name, or the hub cannot be reached.
    """
    from datasets import load_dataset

    name, config, split = _parts(given)
    with _as_data_error(given):
        table = load_dataset(name, config, split=split)
    return len(table), iter(table)


def hub_info(given: str) -> HubInfo:
    """Return what is known about a data set before its rows are read.

    Raises:
        DataError: if there is none of that name, or the hub cannot be reached.
    """
    from datasets import load_dataset_builder

    name, config, split = _parts(given)
    with _as_data_error(given):
        builder = load_dataset_builder(name, config)
    licence = builder.info.license
    if not licence:
        with suppress(Exception):  # a card that cannot be read names no licence
            from huggingface_hub import dataset_info

            card = dataset_info(name).card_data
            licence = card.get("license") if card is not None else None
    return HubInfo(
        f"{name} {config} {split} {builder.hash}",
        builder.info.download_size,
        str(licence or f"see https://huggingface.co/datasets/{name}"),
    )


def _parts(given: str) -> tuple[str, str | None, str]:
    match = HUB_NAME.fullmatch(SHORT_NAMES.get(given, given))
    assert match is not None
    return match["name"], match["config"] or None, match["split"] or "train"


@contextmanager
def _as_data_error(given: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise DataError(
            f"{given}: not a local file, and no data set of the hub could be read by that name "
            f"({type(error).__name__}: {lines[0].rstrip('.')}). "
            "Check the name and the connection, or give a file."
        ) from error
