"""What `convert` takes, and what it returns; no torch, for `--help` needs none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmslim.progress import Progress

if TYPE_CHECKING:
    import torch

    from llmslim.recipe import Recipe
    from llmslim.report.report import Report
    from llmslim.storage import Source

    RecipeLike = Recipe | str | Path | Mapping[str, Any]
else:  # which imports pydantic, and `--help` needs none
    RecipeLike = Any
"""A recipe, its file, the name of a shipped one, or a mapping shaped like a recipe file."""
_IN_KEY: Mapping[str, Any] = {"in_key": True}  # a result depends on it


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `convert`.

    Attributes:
        recipe: Name of a shipped recipe, or a recipe file; a kphi-3 checkpoint needs none.
        out: Folder to write; ./MODEL-RECIPE by default.
        init: How blocks get their weights, in place of the recipe's.
        calibration: Text to fit the blocks to, in place of the recipe's: self (sampled from MODEL),
            a .txt, .jsonl, .json, .csv or .parquet file (each also .gz), or a data set. Given
            several times, equal parts of each. Implies --init least_squares.
        calibration_tokens: Tokens of calibration text in total; 65536 unless the recipe sets it.
        device: Where to fit blocks to text: cpu, cuda, cuda:1 ...; by default a GPU, if any.
        dtype: Type of the weights; by default as MODEL has them.
        seed: Seed of random weights.
        trust_remote_code: Run the modeling code that comes with MODEL.
        allow_nonfinite: Accept weights of MODEL that are NaN or infinite; the report names them.
        max_shard_size: Maximum size of a file of weights, such as 5GB; a conversion layer by layer
            writes at least one file per layer.
        resume: Continue a conversion that was interrupted.
        overwrite: Replace the folder if it exists; discard an unfinished conversion, unless
            --resume.
        progress: Called with how many steps are done, how many there are (0 while that is not
            known), and what comes now.
    """

    recipe: RecipeLike | None = field(
        default=None, metadata={"flags": ("-r", "--recipe"), "metavar": "NAME|FILE"}
    )
    out: str | Path | None = field(
        default=None, metadata={"flags": ("-o", "--out"), "metavar": "FOLDER"}
    )
    _: KW_ONLY
    init: str | None = field(default=None, metadata={"metavar": "NAME", **_IN_KEY})
    calibration: str | Sequence[str] | None = field(
        default=None, metadata={"metavar": "NAME|FILE", "multiple": True, **_IN_KEY}
    )
    calibration_tokens: int | None = field(default=None, metadata={"metavar": "N", **_IN_KEY})
    device: str | None = field(default=None, metadata={"metavar": "NAME"})
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(default=None, metadata=_IN_KEY)
    seed: int = field(default=0, metadata=_IN_KEY)
    trust_remote_code: bool = False
    allow_nonfinite: bool = False
    max_shard_size: int | str = field(default="50GB", metadata={"metavar": "SIZE", **_IN_KEY})
    resume: bool = False
    overwrite: bool = False
    progress: Progress | None = field(default=None, metadata={"flags": ()})


@dataclass(frozen=True)
class Request:
    """A conversion whose model was found."""

    source: Source
    recipe: Recipe
    target: Path
    device: torch.device
    options: ConvertOptions
    """With the method, the texts and the bytes of a file that the caller's come to."""
    tell: Progress


@dataclass(frozen=True)
class Conversion:
    """What `convert` made."""

    path: Path
    """The checkpoint's folder."""
    report: Report
    auto_class: str = "AutoModelForCausalLM"
    """Name of the class of transformers' that loads it."""
