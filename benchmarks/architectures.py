"""Write docs/architectures.md: what a recipe reaches of every causal language model there is.

    python benchmarks/architectures.py > docs/architectures.md

Each architecture of transformers' causal-LM mapping is planned at its default size without memory,
then a tiny random model of it is slimmed, saved, loaded and asked for text, and another one fitted
to token ids (tests/every_architecture.py). Six minutes on one core; nothing is downloaded.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import torch
import transformers
from every_architecture import (
    FILLED_IN,
    MLP_AND_ATTENTION,
    config_classes,
    coverage,
    default_config,
    fit_to_text,
    logits,
    round_trip,
    tiny_model,
    walk,
)
from general_recipes import NOT_PLANNED, general_recipes
from transformers import AutoModelForCausalLM

from llmslim import SlimError, surgery
from llmslim.surgery.plan import model_on_meta

_SHOWN = 0.0005
"""Smallest share of the parameters that is worth a word."""

HEAD = """# Architectures

What a recipe that names the usual MLPs and attention (`MLP_AND_ATTENTION` in
`tests/every_architecture.py`) reaches of every causal language model of transformers {version}.
`llmslim plan` says the same of any model and recipe, parameter by parameter.

*Covered* is the share of the parameters that are in replaced maps, token and position embeddings
and the output head left out, at the architecture's default size. *Stays* is the rest, where it is
{shown} or more. *Round trip*: a tiny random model was slimmed, saved, loaded with the same
logits, and wrote text. *Fit to text*: whether a tiny one could be fitted to token ids
(`init: least_squares`, `structure: auto`), or why not; `init: project` needs no text and does
for all. Any model whose last layers read keys and values of earlier ones
(`num_kv_shared_layers`, as in Gemma 3n) cannot be, either. *Left* is what share of
those parameters `mlp-half` and `grouped-half` leave; a dash where one saves nothing, for one of
these reasons:

{reasons}

{total} architectures; {planned} can be built from their default config, and {filled} (*) once what
it leaves empty is filled in (`FILLED_IN` there). {covered} of these are covered to 90 % or more;
{trips} round trips, {fits} fits. Made by
`python benchmarks/architectures.py > docs/architectures.md`.

| Type | Class | Parameters | Covered | Stays | Round trip | Fit to text | Left |
|---|---|---:|---:|---|---|---|---|
"""


def main() -> None:
    """Print the document."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows, planned, filled, covered, trips, fits = [], 0, 0, 0, 0, 0
    for name, cls in sorted(config_classes().items()):
        try:
            model: Any = model_on_meta(default_config(name, cls))
        except Exception as error:
            # What transformers cannot build at its default size, a user's checkpoint may be.
            size, share, left = "", "", ""
            stays = f"no model of the default config: {type(error).__name__}"
        else:
            left = _left(model)
            found = coverage(surgery.plan(model, MLP_AND_ATTENTION).report())
            planned += 1
            covered += found.share >= 0.9
            filled += name in FILLED_IN
            mark = " *" if name in FILLED_IN else ""
            size, share = (
                f"{_short(found.parameters)}{mark}",
                f"{found.share:.1%}".replace("%", " %"),
            )
            stays = "; ".join(
                f"{reason} {part / found.parameters:.1%}".replace("%", " %")
                for reason, part in sorted(found.stays.items(), key=lambda item: -item[1])
                if part >= _SHOWN * found.parameters
            )
        kind, trip = _trip(name, cls)
        trips += trip == "yes"
        fit = "" if trip.startswith("not tried") else _fit(cls)
        fits += fit == "yes"
        rows.append(f"| `{name}` | {kind} | {size} | {share} | {stays} | {trip} | {fit} | {left} |")
    head = HEAD.format(
        version=version("transformers"),
        shown="0.05 %",
        total=len(rows),
        planned=planned - filled,
        filled=filled,
        covered=covered,
        trips=trips,
        fits=fits,
        reasons="\n".join(_reasons()),
    )
    print(head + "\n".join(rows))


def _left(model: Any) -> str:
    """Return what two general recipes leave of a model, in words."""
    shares = general_recipes(model, ("mlp-half", "grouped-half")).values()
    return ", ".join("-" if s == 1 else f"{s:.0%}".replace("%", " %") for s in shares)


def _reasons() -> Iterator[str]:
    """Yield a line for every reason why a general recipe saves nothing."""
    concerned: dict[tuple[str, str], list[str]] = {}
    for name, (beginning, why) in NOT_PLANNED.items():
        concerned.setdefault((beginning, why), []).append(f"`{name}`")
    for (beginning, why), names in concerned.items():
        which = f" (`{beginning}-*`)" if beginning else ""
        yield f"- {', '.join(names)}{which}: {why}."


def _trip(name: str, cls: Any) -> tuple[str, str]:
    """Return the model's class, and whether the round trip worked or why not."""
    listed = AutoModelForCausalLM._model_mapping._model_mapping[name]
    kind = listed if isinstance(listed, str) else listed[0]
    with redirect_stdout(sys.stderr):  # some models print
        try:
            model = tiny_model(cls)
            logits(model)
        except Exception as error:
            return kind, f"not tried: no tiny model ({type(error).__name__})"
        try:
            round_trip(model)
        except Exception as error:
            return kind, f"no: {type(error).__name__}"
    return kind, "yes"


def _fit(cls: Any) -> str:
    """Return whether a tiny model could be fitted to text, or why not."""
    with redirect_stdout(sys.stderr):
        try:
            walk(tiny_model(cls))
            fit_to_text(tiny_model(cls))
        except SlimError as error:
            return "no: " + error.problems[0].partition(": ")[2].partition(";")[0]
        except Exception as error:
            return f"no: {type(error).__name__}"
    return "yes"


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count / 1e3:.3g}K"


if __name__ == "__main__":
    main()
