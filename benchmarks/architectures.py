"""Write docs/architectures.md: what a recipe reaches of every language model there is.

    python benchmarks/architectures.py > docs/architectures.md

Each architecture of transformers' causal-LM mapping is planned at its default size without memory,
then a tiny random model of it is slimmed, saved, loaded and asked for text, and another one fitted
to token ids (tests/every_architecture.py). Then the same for what reads images or sound besides
text (tests/every_multimodal.py). Ten minutes on one core; nothing is downloaded.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import every_multimodal as multimodal
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

from llmslim import SlimError, planning
from llmslim.planning.planner import model_on_meta

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


MULTIMODAL = """
## Models that read images or sound

What transformers lists for image-text-to-text or as multimodal, and not above. The same recipe; it
reaches what encodes images or sound, too, where modules there have such names. *Round trip*: loaded
with each Auto class that the source loads with. *Fit to text*: the layers of the text decoder; a
model that answers to no text alone keeps to `init: project`.

{total} architectures; {planned} can be built from their default config. {trips} round trips,
{fits} fits. `python benchmarks/architectures.py multimodal` prints this part alone.

| Type | Class | Parameters | Covered | Stays | Round trip | Fit to text |
|---|---|---:|---:|---|---|---|
"""


def main() -> None:
    """Print the document."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if sys.argv[1:] != ["multimodal"]:
        _causal()
    _multimodal()


def _causal() -> None:
    """Print the table of causal language models."""
    rows, planned, filled, covered, trips, fits = [], 0, 0, 0, 0, 0
    for name, cls in sorted(config_classes().items()):
        shown, share, left = _at_default_size(partial(default_config, name, cls), name in FILLED_IN)
        planned += share is not None
        filled += share is not None and name in FILLED_IN
        covered += share is not None and share >= 0.9
        listed = AutoModelForCausalLM._model_mapping._model_mapping[name]
        kind = listed if isinstance(listed, str) else listed[0]
        trip, fit = _tried(partial(tiny_model, cls), round_trip)
        trips += trip == "yes"
        fits += fit == "yes"
        rows.append(f"| `{name}` | {kind} | {shown} | {trip} | {fit} | {left} |")
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


def _multimodal() -> None:
    """Print the table of what reads more than text."""
    rows, planned, trips, fits = [], 0, 0, 0
    for name in sorted(multimodal.of_images_or_sound()):
        shown, share, _ = _at_default_size(partial(multimodal.default_config, name), False)
        planned += share is not None
        trip, fit = _tried(
            partial(multimodal.tiny_multimodal, name), multimodal.round_trip, multimodal.answer
        )
        trips += trip.startswith("yes")
        fits += fit == "yes"
        rows.append(f"| `{name}` | {multimodal.LISTED[name]} | {shown} | {trip} | {fit} |")
    head = MULTIMODAL.format(total=len(rows), planned=planned, trips=trips, fits=fits)
    print(head + "\n".join(rows))


def _at_default_size(config: Callable[[], Any], filled: bool) -> tuple[str, float | None, str]:
    """Return columns about a default config's model, the share covered, and what recipes leave."""
    try:
        model: Any = model_on_meta(config())
    except Exception as error:
        # What transformers cannot build at its default size, a user's checkpoint may be.
        return f" |  | no model of the default config: {type(error).__name__}", None, ""
    try:
        found = coverage(planning.plan(model, MLP_AND_ATTENTION).report())
    except SlimError as error:
        return f" |  | no plan: {type(error).__name__}", None, ""
    stays = "; ".join(
        f"{reason} {part / found.parameters:.1%}".replace("%", " %")
        for reason, part in sorted(found.stays.items(), key=lambda item: -item[1])
        if part >= _SHOWN * found.parameters
    )
    size = f"{_short(found.parameters)}{' *' if filled else ''}"
    return f"{size} | {found.share:.1%} | ".replace("%", " %") + stays, found.share, _left(model)


def _tried(
    make: Callable[[], Any], trip: Callable[[Any], None], answer: Callable[[Any], Any] = logits
) -> tuple[str, str]:
    """Return whether the round trip of a tiny model worked, and a fit of it to text, or why not."""
    with redirect_stdout(sys.stderr):  # some models print
        try:
            said = answer(make())
        except Exception as error:
            return f"not tried: no tiny model ({type(error).__name__})", ""
        try:
            trip(make())
        except Exception as error:
            return f"no: {type(error).__name__}", ""
    return "yes", "no: it answers to no text alone" if said is None else _fit(make)


def _fit(make: Callable[[], Any]) -> str:
    """Return whether a tiny model could be fitted to text, or why not."""
    with redirect_stdout(sys.stderr):
        try:
            walk(make())
            fit_to_text(make())
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
