"""Options of the verbs: one frozen dataclass for each verb, the only list of its options.

Keywords in Python and options on the command line (`llmslim/cli/options.py`) are both made from the
fields; the docstring of the dataclass is the help of both. Metadata of a field is for the command
line: `flags` in place of `--name`, none where it is for Python alone, `metavar` and `multiple`. A
conversion is resumed only with the same values of the options that have `in_key`; those that have
`recorded` are kept in the report, for the command that makes the model again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar

from llmslim.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmslim.recipe import Heal, Recipe

    RecipeLike = Recipe | str | Path | Mapping[str, Any]
else:  # these import torch or pydantic, which `--help` does without
    PreTrainedModel = Heal = RecipeLike = Any
"""A recipe, its file, the name of a shipped one, or a mapping shaped like a recipe file."""

Model = TypeVar("Model")
Keywords = ParamSpec("Keywords")
Options = TypeVar("Options")
Result = TypeVar("Result")

QUANTIZATIONS = ("f32", "f16", "q8_0", "q4_0")
"""Types that a GGUF file may have its matrices in."""

Dtype = Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]
_LONG = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

_PYTHON_ONLY: Mapping[str, Any] = {"flags": ()}
_RECORDED: Mapping[str, Any] = {"recorded": True}
_IN_KEY: Mapping[str, Any] = {"in_key": True, **_RECORDED}


def long_dtype(name: Any) -> Any:
    """Return the name that torch has for a type; others as they are.

    Example:
        >>> long_dtype("bf16"), long_dtype("float32"), long_dtype(None)
        ('bfloat16', 'float32', None)
    """
    return _LONG.get(name, name)


def without_folder(name: str) -> str:
    """Return a name to publish: of an absolute path its last part, any other as it was given.

    Example:
        >>> without_folder("/home/me/a.txt"), without_folder("../a.txt"), without_folder("who/a")
        ('a.txt', '../a.txt', 'who/a')
    """
    return Path(name).name if Path(name).is_absolute() else name


def flags_of(option: Field[Any]) -> tuple[str, ...]:
    """Return the names of a field on the command line; none where it is for Python alone."""
    named: tuple[str, ...] = option.metadata.get("flags", (f"--{option.name.replace('_', '-')}",))
    return named


def recorded_words(options: type, values: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line that give values which `recorded` returned.

    Args:
        options: the dataclass.
        values: by name of a field; other names are left out.

    Example:
        >>> recorded_words(ConvertOptions, {"own_text": False, "calibration": ["a", "b"]})
        ['--calibration', 'a', '--calibration', 'b', '--no-own-text']
    """
    words: list[str] = []
    for one in fields(options):
        if one.name not in values or not one.metadata.get("recorded"):
            continue
        value, (on, _, off) = values[one.name], flags_of(one)[-1].partition("/")
        if isinstance(value, bool):
            words.append(on if value else off)
        else:
            for each in value if isinstance(value, list) else [value]:
                words += [on, str(each)]
    return words


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `convert`.

    Attributes:
        recipe: Name of a shipped recipe, or a recipe file; a kphi-3 checkpoint needs none.
        out: Folder to write; ./MODEL-RECIPE by default.
        init: How blocks get their weights, in place of the recipe's. Where MODEL is a folder with a
            config and no weights, random (or random_published) also draws all others, as for a
            training from scratch.
        calibration: Text to fit the blocks to, in place of the recipe's: self (sampled from MODEL),
            a .txt, .jsonl, .json, .csv or .parquet file (each also .gz), or a data set. Given
            several times, equal parts of each. Implies --init least_squares.
        own_text: Add text that MODEL writes itself to --calibration, as much as of each text given:
            the result then keeps more of what that text does not show, such as conversation.
        calibration_tokens: Tokens of calibration text in total; 65536 unless the recipe sets it.
        device: Where to fit blocks to text: cpu, cuda, cuda:1 ...; by default a GPU, if any.
        dtype: Type of the weights; by default as MODEL has them.
        seed: Seed of random weights.
        base_model: Name of MODEL on the hub, for the model card, where MODEL itself does not tell.
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
    own_text: bool = field(
        default=True, metadata={"flags": ("--own-text/--no-own-text",), **_IN_KEY}
    )
    calibration_tokens: int | None = field(default=None, metadata={"metavar": "N", **_IN_KEY})
    device: str | None = field(default=None, metadata={"metavar": "NAME", **_RECORDED})
    dtype: Dtype | None = field(default=None, metadata=_IN_KEY)
    seed: int = field(default=0, metadata=_IN_KEY)
    base_model: str | None = field(default=None, metadata={"metavar": "OWNER/NAME", **_IN_KEY})
    trust_remote_code: bool = field(default=False, metadata=_RECORDED)
    allow_nonfinite: bool = field(default=False, metadata=_RECORDED)
    max_shard_size: int | str = field(default="50GB", metadata={"metavar": "SIZE", **_IN_KEY})
    resume: bool = False
    overwrite: bool = False
    progress: Progress | None = field(default=None, metadata=_PYTHON_ONLY)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", long_dtype(self.dtype))

    @property
    def texts(self) -> tuple[str, ...]:
        """The names in `calibration`, also where it is one."""
        given = self.calibration or ()
        return (given,) if isinstance(given, str) else tuple(given)

    @property
    def adds_own_text(self) -> bool:
        """Whether text that the model writes is added to the texts given."""
        return self.own_text and bool(self.texts) and "self" not in self.texts

    def recorded(self) -> dict[str, Any]:
        """Return what decides the result and differs from the defaults, as JSON values."""
        values = {**vars(self), "calibration": [*map(without_folder, self.texts)] or None}
        return {
            one.name: values[one.name]
            for one in fields(self)
            if one.metadata.get("recorded") and values[one.name] != one.default
        }


@dataclass(frozen=True)
class EvalOptions:
    """Options of `evaluate`.

    Attributes:
        against: Dense model to compare with.
        text: Text to score: a .txt, .jsonl, .json, .csv or .parquet file (each also .gz), or a data
            set on the hub. May be given several times.
        windows: Number of windows of each text.
        length: Tokens in a window.
        tasks: Task of lm-evaluation-harness, or a YAML file with one. May be given several times.
        limit: Rows of each task, the first ones; all by default.
        device: Where to run: cpu, cuda, cuda:1 ...; by default a GPU, if any.
        dtype: Type of the weights; by default as MODEL has them.
        store: Keep the scores in MODEL's folder, if it is a checkpoint that llmslim wrote.
        resume: Leave out what is kept there already.
        trust_remote_code: Run the modeling code that comes with MODEL.
        progress: Called with windows done, windows in all, and the name of the text or task.
    """

    against: PreTrainedModel | str | Path | None = field(
        default=None, metadata={"metavar": "MODEL"}
    )
    _: KW_ONLY
    text: str | Sequence[str] | None = field(
        default=None, metadata={"metavar": "NAME|FILE", "multiple": True}
    )
    windows: int = field(default=32, metadata={"metavar": "N"})
    length: int = field(default=512, metadata={"metavar": "N"})
    tasks: str | Sequence[str] | None = field(
        default=None, metadata={"metavar": "NAME|FILE", "multiple": True}
    )
    limit: int | None = field(default=None, metadata={"metavar": "ROWS"})
    device: str | None = field(default=None, metadata={"metavar": "NAME"})
    dtype: Dtype | None = None
    store: bool = field(default=True, metadata={"flags": ("--store/--no-store",)})
    resume: bool = False
    trust_remote_code: bool = False
    progress: Progress | None = field(default=None, metadata=_PYTHON_ONLY)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", long_dtype(self.dtype))


@dataclass(frozen=True)
class BenchOptions:
    """Options of `bench`.

    Attributes:
        against: Dense model to measure in turn with MODEL.
        batch: Rows generated together. May be given several times.
        prompt: Tokens that each row begins with.
        new_tokens: Tokens to write in each row.
        rounds: Rounds that the median is taken over.
        device: Where to run: cpu, cuda, cuda:1 ...; by default a GPU, if any.
        dtype: Type of the weights; by default as each model has them.
        store: Keep the speeds in MODEL's folder, if it is a checkpoint that llmslim wrote.
        trust_remote_code: Run the modeling code that comes with MODEL.
        progress: Called with rounds done, rounds in all, and what is measured.
    """

    against: PreTrainedModel | str | Path | None = field(
        default=None, metadata={"metavar": "MODEL"}
    )
    _: KW_ONLY
    batch: int | Sequence[int] = field(
        default=(1, 8, 32), metadata={"metavar": "ROWS", "multiple": True}
    )
    prompt: int = field(default=128, metadata={"metavar": "TOKENS"})
    new_tokens: int = field(default=32, metadata={"metavar": "TOKENS"})
    rounds: int = field(default=3, metadata={"metavar": "N"})
    device: str | None = field(default=None, metadata={"metavar": "NAME"})
    dtype: Dtype | None = None
    store: bool = field(default=True, metadata={"flags": ("--store/--no-store",)})
    trust_remote_code: bool = False
    progress: Progress | None = field(default=None, metadata=_PYTHON_ONLY)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", long_dtype(self.dtype))


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
    recipe: RecipeLike | Heal | None = field(
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
