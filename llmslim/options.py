"""Options of the verbs: one frozen dataclass for each verb, the only list of its options.

Keywords in Python and options on the command line (`llmslim/cli/options.py`) are both made from the
fields; the docstring of the dataclass is the help of both. Metadata of a field is for the command
line: `flags` in place of `--name` (empty for Python only), and `metavar`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar

from llmslim.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmslim.recipe import Heal, Recipe
else:  # these import torch or pydantic, which `--help` does without
    PreTrainedModel = Heal = Recipe = Any

Model = TypeVar("Model")
Keywords = ParamSpec("Keywords")
Options = TypeVar("Options")
Result = TypeVar("Result")

_PYTHON_ONLY: Mapping[str, Any] = {"flags": ()}


@dataclass(frozen=True)
class HealOptions:
    """Options of `heal` and `plan_heal`.

    An option that is also a key of the recipe's `heal` section replaces that key, unless it is
    None. A model in memory is changed in place, and written only where `out` is given. `data` may
    be rows that `llmslim.data.healing_text` returned.

    Attributes:
        out: Folder to write; ./NAME-healed by default.
        recipe: Recipe whose `heal` section to use, in place of the recipe in the checkpoint.
        data: Text to train on: lamini, self (sampled from the teacher), a data set on the hub, or a
            .jsonl, .json, .parquet, .csv or .txt file.
        teacher: Dense model to learn from.
        train: Parameters to train: of the replaced modules (blocks), all, or blocks fully and the
            other projections by LoRA (lora).
        objective: Loss to train on: cross_entropy (of the text) or logits (of the teacher, the
            default where there is one).
        tokens: Number of tokens to train on.
        epochs: Passes over the data, in place of a number of tokens.
        learning_rate: Peak learning rate.
        context_length: Tokens in a packed row.
        batch_size: Rows in a step.
        seed: Seed of shuffling and of the choice of held-out rows.
        settings: Any other key of the `heal` section, such as warmup=0.1; may be repeated.
        resume: Continue a run that was interrupted.
        overwrite: Replace the folder if it exists, and discard an unfinished run.
        tokenizer: Tokenizer of a model in memory.
        progress: Called with the number of steps done, their total, and what comes next.
    """

    out: str | Path | None = field(default=None, metadata={"flags": ("-o", "--out")})
    _: KW_ONLY
    recipe: Recipe | Heal | Mapping[str, Any] | str | Path | None = field(
        default=None, metadata={"flags": ("-r", "--recipe"), "metavar": "NAME|FILE"}
    )
    data: Any = field(default=None, metadata={"metavar": "NAME|FILE"})
    teacher: PreTrainedModel | str | Path | None = field(
        default=None, metadata={"metavar": "MODEL"}
    )
    train: Literal["blocks", "all", "lora"] | None = None
    objective: str | None = field(default=None, metadata={"metavar": "NAME"})
    tokens: int | None = field(default=None, metadata={"metavar": "N"})
    epochs: float | None = field(default=None, metadata={"metavar": "N"})
    learning_rate: float | None = field(default=None, metadata={"metavar": "RATE"})
    context_length: int | None = field(default=None, metadata={"metavar": "N"})
    batch_size: int | None = field(default=None, metadata={"metavar": "ROWS"})
    seed: int | None = None
    settings: Mapping[str, Any] | None = field(default=None, metadata={"flags": ("--set",)})
    resume: bool = False
    overwrite: bool = False
    tokenizer: Any = field(default=None, metadata=_PYTHON_ONLY)
    progress: Progress | None = field(default=None, metadata=_PYTHON_ONLY)

    def changes(self) -> dict[str, Any]:
        """Return what replaces keys of the `heal` section: all but rows and models in memory."""
        from llmslim.recipe import Heal

        given = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self).items()
            if name in Heal.model_fields and value is not None
        }
        if not isinstance(self.teacher, str | Path | None):
            given["teacher"] = None  # in place of one that the section names
        if hasattr(self.data, "train"):
            del given["data"]
        return {**(self.settings or {}), **given}


def takes(
    options: Callable[Keywords, Options],
) -> Callable[[Callable[[Model, Options], Result]], Callable[Concatenate[Model, Keywords], Result]]:
    """Let callers of `function(model, options)` give the fields of `options` as keywords.

    Args:
        options: a dataclass.

    Example:
        >>> @takes(HealOptions)
        ... def seed_of(model, options):
        ...     return options.seed
        >>> seed_of("slim", seed=3)
        3
    """

    def decorate(
        function: Callable[[Model, Options], Result],
    ) -> Callable[Concatenate[Model, Keywords], Result]:
        @functools.wraps(function)
        def call(model: Model, /, *args: Keywords.args, **keywords: Keywords.kwargs) -> Result:
            return function(model, options(*args, **keywords))

        own, given = inspect.signature(function), inspect.signature(options)
        model = next(iter(own.parameters.values())).replace(kind=inspect.Parameter.POSITIONAL_ONLY)
        shown = own.replace(parameters=[model, *given.parameters.values()])
        call.__signature__ = shown  # type: ignore[attr-defined]  # for help()
        return call

    return decorate
