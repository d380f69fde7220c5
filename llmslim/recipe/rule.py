"""What a rule of a recipe may say: the keys of all rules, and the options of its structure."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from fractions import Fraction
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Optional, Self, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    create_model,
    model_validator,
)

from llmslim.errors import PluginError
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
        PluginError: if it is that of a broken plug-in, or of one whose options cannot be keys.
    """
    if not isinstance(structure, str):
        return Rule
    if structure in _NOT_BLOCKS:
        return _rule_class(structure, describe(_NOT_BLOCKS[structure], vars(sys.modules[__name__])))
    options = structure_options(structure)
    return Rule if options is None else _rule_class(structure, options)


_OF_BLOCKS = ("in_features", "out_features", "bias", "device", "dtype")
"""What every block is built with, beside its options."""


@cache
def _rule_class(structure: str, options: tuple[Option, ...]) -> type[Rule]:
    keys: dict[str, Any] = {
        "structure": (Literal[structure], Field(description="What they become."))
    }
    for option in options:
        if hasattr(Rule, option.name) or option.name in (*Rule.model_fields, *_OF_BLOCKS):
            raise PluginError(
                f"structure {structure!r}: its option {option.name!r} has a name that means "
                "something else already. Choose another name."
            )
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
