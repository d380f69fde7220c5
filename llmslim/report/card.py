"""The model card of a slim checkpoint: what was done to which model, how to load and use it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmslim.errors import printable
from llmslim.report.report import Report
from llmslim.storage import RECIPE, Origin

from . import healed, markdown, wording

_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
}

_LOAD_SLIM = """\
With llmslim installed (`pip install llmslim-toolkit`):

```python
import llmslim
from transformers import {auto}, {reader}

model = {auto}.from_pretrained("path/to/this/folder")
{what} = {reader}.from_pretrained("path/to/this/folder")
```

Without llmslim, use the modeling files in this folder:

```python
model = {auto}.from_pretrained("path/to/this/folder", trust_remote_code=True)
```
"""

_LOAD_PLAIN = """\
Only depth or width changed, so this is an ordinary model of its base class:

```python
from transformers import {auto}, {reader}

model = {auto}.from_pretrained("path/to/this/folder")
{what} = {reader}.from_pretrained("path/to/this/folder")
```
"""

_HONEST = """\
## Before you use it

This model has not been healed (fine-tuned) after the change. Until it is, expect it to be worse
than its base model, and to write nonsense if much was removed. Benchmark results of the base model
do not apply to it.
"""


def model_card(
    report: Report,
    *,
    recipe_text: str = "",
    base_model: str = "",
    origin: Origin | None = None,
    datasets: Sequence[str] = (),
    slim: bool | None = None,
    healing: Mapping[str, Any] | None = None,
    losses: str | None = None,
    auto_class: str = "AutoModelForCausalLM",
) -> str:
    """Return the README.md of a checkpoint.

    Args:
        report: what was done.
        recipe_text: the recipe's YAML as it was used.
        base_model: name on the hub of the model that this one was made from; by default as the
            origin tells.
        origin: what the source's publisher says of it.
        datasets: names on the hub of what it was healed on.
        slim: whether loading needs llmslim's classes; by default, whether the report has blocks.
        healing: `HealReport.to_dict` of a healed model.
        losses: file name of the picture of its losses beside the card, if any.
        auto_class: name of the Auto class that loads it; any but the usual one means a model that
            reads more than text.
    """
    origin = origin or Origin()
    named = base_model or origin.name or origin.base_model
    # Readers need not know the folders on the maker's disk.
    folder = Path(report.model).name
    known = base_model or origin.name or not folder or named.endswith(f"/{folder}")
    base = (named if known else folder) or "a causal language model"
    if slim is None:
        slim = any(row.action == "replaced" for row in report.rows)
    of_text = auto_class == "AutoModelForCausalLM"
    reader, what = ("AutoTokenizer", "tokenizer") if of_text else ("AutoProcessor", "processor")
    load = (_LOAD_SLIM if slim else _LOAD_PLAIN).format(auto=auto_class, reader=reader, what=what)
    totals = report.totals
    kept = wording.percent(totals.non_embedding_after, totals.non_embedding_before, 2)
    changed = any(row.params_before != row.params_after for row in report.rows)
    shown_base, shown_recipe = printable(base), printable(report.recipe)
    sections = [
        _front_matter(origin, named, datasets, auto_class),
        f"# {shown_base}, slimmed with {shown_recipe}\n",
        f"llmslim made this model from {shown_base} "
        f"with the recipe `{shown_recipe}`. It has {totals.params_after:,} parameters; "
        f"{kept} of the non-embedding parameters are left.\n",
        f"## Loading\n\n{load}",
        *([healed.section(healing, losses=losses)] if healing else [_HONEST] if changed else []),
        f"## What changed\n\n{markdown.totals_table(report)}\n\n{markdown.rows_table(report)}\n",
        *([f"{wording.fitted_to(report)}\n"] if report.fitted_to else []),
    ]
    if recipe_text:
        sections.append(f"## Recipe\n\n{_fenced('yaml', recipe_text)}")
        commands = wording.commands(report, RECIPE, healed=healing is not None)
        sections += [again(commands)] if commands else []
    return "\n".join(sections)


def _front_matter(origin: Origin, base_model: str, datasets: Sequence[str], auto_class: str) -> str:
    """Return what the hub reads of a card, as YAML between two lines."""
    pipeline = _PIPELINES.get(auto_class, "audio-text-to-text")
    front: dict[str, object] = {"library_name": "transformers", "pipeline_tag": pipeline}
    front |= origin.front_matter()
    if base_model:
        front |= {"base_model": base_model, "base_model_relation": "finetune"}
    if datasets:
        front["datasets"] = [*datasets]
    front["tags"] = ["llmslim"]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"


def again(commands: Sequence[str]) -> str:
    """Return the section with the commands that make the model again."""
    text = "\n".join(commands)
    return f"## Make it again\n\n{wording.AGAIN}\n\n{_fenced('bash', text)}"


def _fenced(language: str, text: str) -> str:
    """Return text as a block of code that it cannot end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}\n"
