"""The model card of a slim checkpoint: what was done to which model, how to load and use it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llmslim.errors import printable
from llmslim.report.report import Report

from . import healed, markdown, wording

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

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

This model was not trained after the change. Until it is healed (fine-tuned), expect it to be worse
than its base model, and to write nonsense if much was removed. Benchmark results of the base model
do not apply to it.
"""


def model_card(
    report: Report,
    *,
    recipe_text: str = "",
    base_model: str = "",
    slim: bool | None = None,
    healing: Mapping[str, Any] | None = None,
    losses: str | None = None,
    auto_class: str = "AutoModelForCausalLM",
) -> str:
    """Return the README.md of a checkpoint.

    Args:
        report: what was done.
        recipe_text: the recipe's YAML as it was used.
        base_model: hub id or path of the source model; the report's name for it by default.
        slim: whether loading needs llmslim's classes; by default, whether the report has blocks.
        healing: `HealReport.to_dict` of a healed model.
        losses: file name of the picture of its losses beside the card, if any.
        auto_class: name of the Auto class that loads it; any but the usual one means a model that
            reads more than text.
    """
    given = base_model or report.model
    # Readers need not know the folders on the maker's disk.
    is_hub_id = bool(_HUB_ID.fullmatch(given)) and not Path(given).exists()
    base = given if is_hub_id else Path(given).name or "a causal language model"
    if slim is None:
        slim = any(row.action == "replaced" for row in report.rows)
    of_text = auto_class == "AutoModelForCausalLM"
    pipeline = _PIPELINES.get(auto_class, "audio-text-to-text")
    reader, what = ("AutoTokenizer", "tokenizer") if of_text else ("AutoProcessor", "processor")
    load = (_LOAD_SLIM if slim else _LOAD_PLAIN).format(auto=auto_class, reader=reader, what=what)
    front: dict[str, object] = {"library_name": "transformers", "pipeline_tag": pipeline}
    if is_hub_id:
        front["base_model"] = base
    front["tags"] = ["llmslim"]
    totals = report.totals
    kept = wording.percent(totals.non_embedding_after, totals.non_embedding_before, 2)
    changed = any(row.params_before != row.params_after for row in report.rows)
    shown_base, shown_recipe = printable(base), printable(report.recipe)
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
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
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe_text)), default=0))
        sections.append(f"## Recipe\n\n{fence}yaml\n{recipe_text.strip()}\n{fence}\n")
    return "\n".join(sections)
