"""What a recipe may say. Every key, its type and its meaning; nothing else is accepted.

A recipe changes a model in the order of its sections: which layers stay (`depth`), how wide the
MLP is (`width`), which projections become structured (`replace`). `init` names how the blocks get
their weights from the dense ones; `calibration` and `heal` say what text they are fitted and
trained on.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Optional, Self, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    WithJsonSchema,
    create_model,
    model_validator,
)

from llmslim.errors import RecipeError
from llmslim.plugins import STRUCTURES, Option, describe, structure_options

from .roles import ROLES, known_role, plays


def _read_fraction(value: Any) -> Any:
    """Let a ratio be written as people say it: `1/3`."""
    # Nothing longer and no exponents: Fraction("1e999999999") would write out all its digits.
    if isinstance(value, str) and re.fullmatch(
        r" *\d{1,18} */ *0*[1-9]\d{0,17} *", value, re.ASCII
    ):
        return float(Fraction(value.replace(" ", "")))
    return value


Ratio = Annotated[
    float,
    BeforeValidator(_read_fraction),
    Field(gt=0, le=1, json_schema_extra={"anyOf": [{"type": "number"}, {"pattern": r"^\d+/\d+$"}]}),
]
Count = Annotated[int, Field(ge=1, le=1 << 53, strict=True)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]

_NAMES = {"type": "string", "enum": [*ROLES]}
Role = Annotated[str, AfterValidator(known_role)]


def _as_list(value: Any) -> Any:
    if not isinstance(value, str | list | tuple):
        raise ValueError("a role, or a list of roles")
    return [value] if isinstance(value, str) else value


Roles = Annotated[
    tuple[Role, ...],
    BeforeValidator(_as_list),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [_NAMES, {"type": "array", "items": _NAMES, "minItems": 1}]}),
]


class Section(BaseModel):
    """A part of a recipe: frozen, and closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Depth(Section):
    """Which decoder layers stay."""

    keep_layers: (
        Count | Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]
    )
    """How many layers stay, spread evenly from the first to the last; or a list of their indices, from 0."""


class Width(Section):
    """How wide the MLPs are."""

    intermediate_size: Count
    """Neurons of every MLP. More than before: neurons are duplicated, the function stays the same. Fewer: the least important go."""


@dataclass(frozen=True)
class _Width:
    keep_ratio: Annotated[float, "Share of the neurons that stay, as 0.5 or 1/3."]


@dataclass(frozen=True)
class _Auto:
    pass


_NOT_BLOCKS: dict[str, Any] = {"auto": _Auto, "width": _Width}


def known_structure(name: str) -> str:
    """Return the name of a structure as it is.

    Raises:
        ValueError: if there is no such structure.
    """
    known = sorted((*_NOT_BLOCKS, *STRUCTURES.names()))
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        meant = f". Did you mean {close[0]}?" if close else ""
        raise ValueError(f"allowed {', '.join(known)}{meant}")
    return name


class Rule(Section):
    """What happens to the projections it matches; the first rule that matches wins.

    Beside the keys below it takes the options of its structure.
    """

    match: str | Annotated[list[str], Field(min_length=1)] | None = None
    """A glob, or several, on dotted module names; `*` also matches dots: `*.mlp.*`."""
    role: Roles | None = None
    """What a projection is in its decoder layer, or several such: `mlp`, `attention.q`; with `match`, both must hold."""
    keep: Literal[True] | None = None
    """Leave these projections as they are."""
    structure: Annotated[Name, AfterValidator(known_structure)] | None = None
    """What they become: a structure; `width`, fewer neurons for a whole MLP; or `auto`, chosen by measurement within the recipe's `budget`."""
    neurons: Ratio | None = None
    """Any structure, on all projections of an MLP: share of the neurons that stay before the projections are replaced; `keep_ratio` remains the share of the original weights."""
    init: Name | None = None
    """How these blocks get their weights; the recipe's `init` where not given."""

    @property
    def globs(self) -> tuple[str, ...]:
        """The rule's globs, always as a tuple; all names where it gives none."""
        if self.match is None:
            return ("*",)
        return (self.match,) if isinstance(self.match, str) else tuple(self.match)

    def is_for(self, role: str) -> bool:
        """Return whether the rule concerns projections of a role; any, where it names none."""
        return self.role is None or any(plays(role, wanted) for wanted in self.role)

    def options(self) -> dict[str, Any]:
        """Return the structure's options that were given."""
        return self.model_dump(
            exclude=set(Rule.model_fields), exclude_none=True, exclude_unset=True
        )

    @model_validator(mode="wrap")
    @classmethod
    def _with_options(cls, value: Any, handler: Any) -> Any:
        """Read a rule with the options of the structure that it names."""
        if cls is not Rule or not isinstance(value, Mapping):
            return handler(value)
        known = rule_class(value.get("structure"))
        if known is not Rule:
            return known.model_validate(value)
        if isinstance(value.get("structure"), str):  # an unknown one: its options are not known
            value = {key: given for key, given in value.items() if key in Rule.model_fields}
        return handler(value)

    @model_validator(mode="after")
    def _one_outcome(self) -> Self:
        if self.role is None and self.match is None:
            raise ValueError("a rule says which projections by `match`, by `role` or by both")
        if (self.keep is None) == (self.structure is None):
            raise ValueError("a rule says either `keep: true` or a `structure`")
        if self.keep and (self.init or self.neurons):
            raise ValueError("a rule with `keep: true` takes no other key than `match` and `role`")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        """Describe a rule that keeps, and one for each structure."""
        if cls is not Rule:
            return dict(handler(core))
        names = (*_NOT_BLOCKS, *STRUCTURES.names())
        each = [handler(rule_class(name).__pydantic_core_schema__) for name in names]
        return {"anyOf": [handler(core), *each]}


def rule_class(structure: Any) -> type[Rule]:
    """Return the class of rules that name a structure: with its options as further keys.

    Args:
        structure: a name; of anything else, the class of all rules.

    Raises:
        PluginError: if it is that of a broken plug-in.
    """
    if not isinstance(structure, str):
        return Rule
    if structure in _NOT_BLOCKS:
        return _rule_class(structure, describe(_NOT_BLOCKS[structure], vars(sys.modules[__name__])))
    options = structure_options(structure)
    return Rule if options is None else _rule_class(structure, options)


@cache
def _rule_class(structure: str, options: tuple[Option, ...]) -> type[Rule]:
    keys: dict[str, Any] = {
        "structure": (Literal[structure], Field(description="What they become."))
    }
    for option in options:
        default = ... if option.default is MISSING else option.default
        kind = Ratio if option.name == "keep_ratio" else _checked(option.kind)
        if default is None:
            kind = Optional[kind]  # noqa: UP045  (of a type that is known at run time only)
        keys[option.name] = (kind, Field(default, description=option.help))
    name = "".join(map(str.capitalize, structure.split("_")))
    made: type[Rule] = create_model(f"{name}Rule", __base__=Rule, **keys)
    return made


_WHOLE = Annotated[int, Field(strict=True, ge=-(1 << 53), le=1 << 53)]
_NUMBER = Annotated[float, BeforeValidator(_read_fraction)]


def _checked(kind: Any) -> Any:
    """Return an option's type as recipes are read: whole numbers strictly, others also as 1/3."""
    if get_origin(kind) in (Union, UnionType):
        return Union[tuple(_checked(each) for each in get_args(kind))]  # noqa: UP007
    return {int: _WHOLE, float: _NUMBER}.get(kind, kind)


class Refine(Section):
    """A short gradient fit after the closed forms: each layer's output to the dense layer's."""

    steps: Count = 64
    """Steps of the optimiser for each decoder layer."""
    lr: Annotated[float, Field(gt=0)] = 3e-2
    """Peak step, in units of each parameter's root mean square: one value serves every model."""
    logits_steps: Annotated[int, Field(ge=0)] = 0
    """Steps after those on the model's predictions in place of the layer's output; for a GPU."""


class Calibration(Section):
    """Text whose activations the blocks are fitted to."""

    data: str | Annotated[tuple[str, ...], Field(min_length=1)] = "self"
    """`self` (sampled from the dense model), a data set on the hub, a .txt, .jsonl, .json, .csv or .parquet file, or a list of them."""
    tokens: Count = 65_536
    """Tokens to read; of several texts, as many of each."""
    sequence_length: Count = 1024
    """Tokens of one window."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Seed of sampling and shuffling."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the names of the data as a tuple, also where there is one."""
        return (self.data,) if isinstance(self.data, str) else self.data


class HealSource(Section):
    """One data set of several to train on."""

    data: str
    """As `data` of `heal`: a name or a file."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row is seen in one pass: 2 is twice, 0.5 a random half."""
    fields: Mapping[str, str] | None = None
    """Columns: `{prompt: …, answer: …}`, perhaps with `system`, `context`, `tools`, `reasoning`; or
    `{messages: …}`, perhaps with `system` and `tools`; or `{text: …}`."""
    filter: Literal["refusals", "none"] | None = None
    """Whether rows that refuse are dropped; by default `refusals` for `lamini`, none for all else."""


class Heal(Section):
    """Fine-tuning after surgery."""

    data: str | HealSource | tuple[str | HealSource, ...] = "lamini"
    """`lamini`, `self`, a data set on the hub, a .jsonl, .json, .parquet, .csv or .txt file, or a list of them."""
    template: Literal["chat", "report"] = "chat"
    """How a row becomes text: the tokenizer's chat template, or the kphi-3 report's."""
    loss_on: Literal["all", "answers"] = "all"
    """Which tokens are learned."""
    held_out: Annotated[int, Field(ge=0)] | None = None
    """Rows kept for measuring; by default 5000 of `lamini`, of other data 5 % and at most 1000."""
    train: Literal["blocks", "all", "lora"] = "lora"
    """What is trained: what surgery changed, everything, or that and LoRA on what stayed dense."""
    lora_rank: Count = 16
    """Rank of the LoRA matrices; their scale is 2."""
    teacher: str | None = None
    """The dense model, a folder or a name on the hub: what `logits` and `layers` learn from."""
    objective: Name | None = None
    """cross_entropy, logits or layers; by default `logits` where there is a teacher."""
    layers_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps, the first ones, that match the teacher's decoder layers (`layers`)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """`logits`: softens both distributions."""
    teacher_weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """`logits`: weight of the teacher; the rest is cross-entropy on the text."""
    top_k: Count | None = None
    """`logits`: compare the teacher's likeliest tokens, and all others as one."""
    store_teacher: bool = False
    """`logits`: ask the teacher once, before training, and keep its `top_k` (64 where not given) in a file."""
    blend_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps, the first ones, in which the teacher's projections carry part of the blocks' work."""
    tokens: Count | None = None
    """Tokens to train on; takes the place of `epochs`."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data."""
    context_length: Count = 4096
    """Tokens of one packed row; at most what the model reads."""
    batch_size: Count = 1
    """Rows of one step, over all processes."""
    micro_batch: Count = 1
    """Rows in memory at once, in each process."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    block_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of what surgery changed; as `learning_rate` where not given."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps over which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's; norms and biases have none."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Longer gradients are cut to this length."""
    gradient_checkpointing: bool = False
    """Compute activations twice rather than keep them: slower, much less memory."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the arithmetic; weights and optimiser are float32. `auto` is bf16 where the machine is fast at it."""
    store_dtype: Literal["float32"] | None = None
    """float32 stores all weights as they were trained; by default they are rounded to the type they had."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """`auto` is FlashAttention-2 where GPU and package allow it, SDPA otherwise."""
    evaluate_every: Count | None = None
    """Steps between measurements on held-out rows, each followed by a save; by default a tenth of all."""
    patience: Count | None = 3
    """Stop after this many measurements without a better one; null never does."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 42
    """Seed of shuffling and of the held-out split."""


class Recipe(Section):
    """A recipe, checked; made by `Recipe.load` or from keyword arguments.

    Example:
        >>> rule = {"match": "*.mlp.*", "structure": "low_rank", "keep_ratio": "1/3"}
        >>> Recipe(name="third", replace=[rule]).replace[0].options()
        {'keep_ratio': 0.3333333333333333}
    """

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^/\\\x00-\x1f\x7f]+$")]
    """Short name, used in reports and output folders."""
    description: str = ""
    """One or two sentences on what the recipe does."""
    source: str = ""
    """Where the recipe comes from."""
    depth: Depth | None = None
    width: Width | None = None
    replace: tuple[SerializeAsAny[Rule], ...] = ()
    """Rules, tried in this order on every projection."""
    budget: Ratio | None = None
    """For rules with `structure: auto`: share of the weights of all projections they match that stays."""
    init: Name = "project"
    """How blocks get their weights: project, least_squares, random, random_published."""
    calibration: Calibration | None = None
    refine: Refine | None = None
    """A gradient fit after `init: least_squares`; left out, there is none."""
    heal: Heal | None = None

    _lines: dict[tuple[str | int, ...], int] = PrivateAttr(default_factory=dict)
    _file: str = PrivateAttr(default="recipe")

    @model_validator(mode="after")
    def _budget_for_auto(self) -> Recipe:
        if self.has_auto and self.budget is None:
            raise ValueError(
                "`structure: auto` needs a `budget`, the share of the weights to keep, as 0.5"
            )
        if self.budget is not None and not self.has_auto:
            raise ValueError("a `budget` is for rules with `structure: auto`; there is none")
        return self

    @property
    def has_auto(self) -> bool:
        """Whether any rule leaves the structure to measurement."""
        return any(rule.structure == "auto" for rule in self.replace)

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """Read a recipe file, or a shipped recipe by its name.

        Args:
            source: path of a YAML file, or a name such as `kphi3`.

        Raises:
            RecipeError: if there is no such recipe, or anything in it is wrong; all problems at
                once, each with file, line and key.

        Example:
            >>> Recipe.load("kphi3").replace[0].options()
            {'min_channels_per_group': 256}
        """
        from .load import load_recipe  # the reader builds on this schema

        return load_recipe(source)

    @classmethod
    def of(cls, recipe: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
        """Return a recipe from whatever a caller has: a Recipe, a path, a name or a dictionary.

        Raises:
            RecipeError: as `load` does.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            from .load import recipe_from_dict

            return recipe_from_dict(recipe)
        return cls.load(recipe)

    def where(self, *path: str | int) -> str:
        """Return where a key stands, for messages: `half.yaml:12 replace[1].groups`."""
        line = next(
            (self._lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self._lines),
            None,
        )
        return f"{self._file}{f':{line}' if line else ''} {key_text(path)}".rstrip()

    def problem(self, path: tuple[str | int, ...], sentence: str) -> RecipeError:
        """Return an error about one key of this recipe."""
        return RecipeError(f"{self.where(*path)}: {sentence}")


def key_text(path: tuple[str | int, ...]) -> str:
    """Write a path of keys as people do.

    Example:
        >>> key_text(("replace", 1, "groups"))
        'replace[1].groups'
    """
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
