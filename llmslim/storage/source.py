"""Find a model and check its files: hub id, folder or .gguf file.

Everything that can be known without reading a weight is checked first, so that a broken download
is one sentence naming the file, and never a model with fresh random weights in the gaps.

Left out: pickled weights (they can run code), and quantised ones that only other libraries can
unpack (see `config`).
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, logging

from llmslim.compat import no_gguf_bar
from llmslim.errors import CheckpointError
from llmslim.modeling.base_class import auto_class_of
from llmslim.modeling.configuration_llmslim import MODEL_TYPE, register

from .config import adapter_note, check_config, check_folder, check_head, check_quantisation
from .gguf_header import check_gguf
from .kphi3 import kphi3_config
from .kphi3_layout import is_kphi3_config
from .safetensors_io import has_weights, hub_snapshot, read_json, read_weights

CARD = "README.md"
"""A model's card."""
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Files with a model's terms, which stay with everything made of it."""
_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>\w[\w./-]*))?")
_MAX_HUB_ID = 200


@dataclass(frozen=True)
class Source:
    """A model that was found and whose files were checked; nothing is loaded yet."""

    given: str
    """What the user wrote."""
    path: Path | None
    """The folder; for hub ids, the folder of the downloaded snapshot."""
    gguf_file: str | None
    """Name of the .gguf file in the folder, if that holds the weights."""
    config: PreTrainedConfig
    is_kphi3: bool
    """Whether it is a published kphi-3 checkpoint, which `kphi3` reads."""
    has_weights: bool = True
    """Whether its files hold weights; without them it can be planned, and weights drawn for it."""

    @property
    def name(self) -> str:
        """The last part of what was given: `SmolLM2-135M` for `HuggingFaceTB/SmolLM2-135M`.

        A snapshot in the hub's cache has the name of its repository, not of its revision; a folder
        inside one, both names.
        """
        place = Path(self.given).expanduser().resolve()
        snapshot = hub_snapshot(place)
        if snapshot is None or not snapshot.parents[1].name.startswith("models--"):
            return place.name.removesuffix(".gguf")
        repository = snapshot.parents[1].name.rpartition("--")[2]
        return "-".join([repository, *place.relative_to(snapshot).parts]).removesuffix(".gguf")


def open_source(
    model: str | Path,
    *,
    trust_remote_code: bool = False,
    weights: bool = True,
    or_none: bool = False,
) -> Source:
    """Find a model and check its files.

    Args:
        model: a folder, a .gguf file, or a model's name on the hub, which is downloaded;
            `owner/name@revision` is a branch, a tag or a commit of it.
        trust_remote_code: run the Python files that come with the model, where it needs them.
        weights: whether weights are needed; without, a folder with only config.json will do.
        or_none: with `weights`, accept a folder that has none at all; those that are there are
            needed as ever.

    Raises:
        CheckpointError: if there is no such model, or its files are not whole.
    """
    given = str(model)
    path = Path(os.path.expanduser(given))  # noqa: PTH111  (Path's raises for unknown users)
    if os.path.isfile(path):  # noqa: PTH113  (Path's raises on names that are too long)
        if path.suffix != ".gguf":
            raise CheckpointError(
                f"{given}: a file that is not .gguf; a model is a folder, a .gguf file or a name "
                "on the hub. Give the folder that the file is in."
            )
        return _open_gguf(given, path)
    # Path("") is the current folder, which nobody means by an empty name.
    local = os.path.isdir(path) and given.strip() != ""  # noqa: PTH112  (as above)
    if local:
        folder = path
    else:
        folder = _download(given, trust_remote_code, weights)
        given = given.partition("@")[0]
    return _open_folder(given, folder, trust_remote_code, weights, or_none)


def _open_folder(
    given: str, folder: Path, trust_remote_code: bool, weights: bool, or_none: bool
) -> Source:
    """Check the files of a folder; arguments as of `open_source`.

    Raises:
        CheckpointError: as it does.
    """
    ggufs = sorted(folder.glob("*.gguf"))
    plannable = not weights and (folder / "config.json").is_file()
    if ggufs and not plannable and not any(folder.glob("*.safetensors")):
        if len(ggufs) > 1:
            raise CheckpointError(
                f"{given}: holds {len(ggufs)} .gguf files, such as {ggufs[0].name}; one is "
                "needed. Give the file itself."
            )
        return _open_gguf(given, ggufs[0])
    if not (folder / "config.json").is_file():
        adapter = adapter_note(folder)
        if adapter is not None:
            raise CheckpointError(adapter)
        raise CheckpointError(
            f"{given}: has no config.json; a model folder holds config.json and "
            f"{'safetensors weights' if weights else 'may hold weights'}, or one .gguf file."
        )
    check_folder(folder)
    config_dict = read_json(folder / "config.json")
    check_config(config_dict, folder / "config.json")
    there = has_weights(folder)
    if weights and (there or not or_none):
        check_quantisation(config_dict, given)
        read_weights(folder)
    if is_kphi3_config(config_dict):
        return Source(given, folder, None, kphi3_config(folder), is_kphi3=True, has_weights=there)
    config = _read_config(given, folder, config_dict, trust_remote_code)
    check_head(config, folder, given)
    return Source(given, folder, None, config, is_kphi3=False, has_weights=there)


def empty_model(
    config: PreTrainedConfig, where: str, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the model that a config describes, on the meta device: no memory for its weights.

    Args:
        config: of a language model, with parts that read images or sound or without.
        where: whose config it is, for messages.
        trust_remote_code: as for `open_source`.

    Raises:
        CheckpointError: if no model can be built from it.
    """
    register()
    try:
        auto = auto_class_of(config, trust_remote_code=trust_remote_code)
        with quiet(), torch.device("meta"):
            model: PreTrainedModel = auto.from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code
            )
    except Exception as error:  # sizes that do not fit, in as many classes as there are models
        raise CheckpointError(
            f"{where}: cannot be loaded as a causal language model ({first_line(error)})."
        ) from error
    return model


def first_line(error: BaseException) -> str:
    """Return the class and text of an error, short enough to stand in a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _download(given: str, trust_remote_code: bool, weights: bool) -> Path:
    """Return the folder of a hub model, downloaded where needed.

    Raises:
        CheckpointError: if there is no such model, or the hub cannot be reached.
    """
    name = _HUB_ID.fullmatch(given)
    if name is None or len(given) > _MAX_HUB_ID:
        raise CheckpointError(
            f"{given[:200]!r}: not a local folder or file, and not a name on the hub; "
            "allowed are a path, owner/name or owner/name@revision. Check the path."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    wanted = ["*.json", "*.model", "*.txt", "*.jinja", CARD, *LICENCES]
    wanted += ["*.safetensors"] if weights else []
    wanted += ["*.py"] if trust_remote_code else []
    try:
        with quiet():
            folder = snapshot_download(
                name["name"],
                revision=name["revision"],
                allow_patterns=wanted,
                # The same weights again, in other formats.
                ignore_patterns=["original/*", "onnx/*", "consolidated*"],
            )
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{given}: the model has no such branch, tag or commit. Check its page on the hub."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{given}: not a local folder or file, and the hub has no such model, or it is "
            "private. Check the name, or log in with `hf auth login`."
        ) from error
    except Exception as error:  # name lookup, proxies, timeouts, offline mode: many classes
        raise CheckpointError(
            f"{given}: not a local folder or file, and the hub could not be reached "
            f"({first_line(error)})."
        ) from error
    return Path(folder)


def _open_gguf(given: str, path: Path) -> Source:
    if check_gguf(path) == "deci":
        raise CheckpointError(
            f"{path}: layers of different widths (GGUF architecture deci), which llama.cpp reads "
            "and transformers does not. Use the checkpoint that it was made from."
        )
    try:
        with quiet():
            # Reads the whole table of tensors, so that a file cut short fails here.
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading GGUF needs the gguf package. Run pip install 'llmslim-toolkit[gguf]'."
        ) from error
    except Exception as error:  # the readers raise whatever the bytes lead them into
        raise CheckpointError(
            f"{path}: not a whole GGUF file of a known architecture ({first_line(error)}). "
            "Download or copy it again."
        ) from error
    check_config(config.to_dict(), path)
    return Source(given, path.parent, path.name, config, is_kphi3=False)


def _read_config(
    given: str, folder: Path, config_dict: dict[str, Any], trust_remote_code: bool
) -> PreTrainedConfig:
    """Return a folder's config.

    Raises:
        CheckpointError: if transformers cannot make a config of it.
    """
    register()
    try:
        with quiet():
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # config classes check their own fields, each in its own way
        # The files that slim checkpoints come with are llmslim's own, and here already.
        trusted = trust_remote_code or config_dict.get("model_type") == MODEL_TYPE
        hint = (
            ""
            if trusted or "auto_map" not in config_dict
            else (" It comes with Python files: if you trust them, pass trust_remote_code=True.")
        )
        raise CheckpointError(
            f"{given}: its config.json cannot be used ({first_line(error)}).{hint}"
        ) from error
    return config


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' and the hub's logs and progress bars; restore what was set before."""
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    no_hub_bars = are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with no_gguf_bar():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        # transformers' switch moves the hub's as well, so the hub's comes last.
        if no_hub_bars:
            disable_progress_bars()
        else:
            enable_progress_bars()
