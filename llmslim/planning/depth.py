"""Keep fewer decoder layers, each computing what it did: which are kept, and by which config.

Candidates for the new config are tried, not trusted: a model is built from each, without weights,
and compared with the model that is left once the other layers are taken out of the original. Where
none agrees, because layers depend on their index or on how many there are, the checkpoint keeps a
record of the original (`modeling.depth`). What neither can express is refused.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llmslim.anatomy import (
    CannotRunError,
    changed_attributes,
    differences,
    first_difference,
    layer_operations,
)
from llmslim.anatomy.sites import Layers
from llmslim.compat import forget_initialized
from llmslim.editing.plans import Attributes, DepthPlan, Fields
from llmslim.errors import TargetError
from llmslim.modeling.depth import (
    drop_layers,
    plain_class,
    set_attributes,
    set_config,
    set_fields,
)
from llmslim.modeling.modeling_llmslim import base_of
from llmslim.recipe import Recipe


def kept_layers(recipe: Recipe, count: int) -> tuple[int, ...]:
    """Return the indices of the decoder layers that stay.

    A count keeps layers spread evenly from the first to the last: both ends of a decoder do work
    that no other layer repeats.

    Args:
        recipe: its `depth` section, all layers stay without one.
        count: decoder layers of the model.

    Raises:
        RecipeError: if a layer is listed that the model does not have, or twice.

    Example:
        >>> kept_layers(Recipe(name="r", depth={"keep_layers": 3}), 32)
        (0, 16, 31)
    """
    if recipe.depth is None:
        return tuple(range(count))
    keep = recipe.depth.keep_layers
    where = ("depth", "keep_layers")
    if isinstance(keep, int):
        if keep > count:
            raise recipe.problem(where, f"{keep}; the model has {count} layers.")
        step = (count - 1) / max(1, keep - 1)
        return tuple(int(index * step + 0.5) for index in range(keep))
    if wrong := [index for index in keep if index >= count]:
        raise recipe.problem(where, f"{wrong}; the model has layers 0 to {count - 1}.")
    if len(set(keep)) != len(keep):
        raise recipe.problem(where, f"{keep}; each layer at most once.")
    return tuple(keep)


def check_independent(model: nn.Module, layers: Layers, keep: tuple[int, ...]) -> None:
    """Refuse to drop a layer that holds parameters of one that stays.

    Raises:
        TargetError: if there is one.
    """
    users: dict[int, set[int]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        index = layers.index_of(name)
        if index is not None:
            users[id(parameter)].add(index)
    for shared in users.values():
        gone, stay = sorted(shared.difference(keep)), sorted(shared.intersection(keep))
        if gone and stay:
            raise TargetError(
                f"{layers.path}: layers {gone[0]} and {stay[0]} share parameters; they can be kept "
                "or dropped together only. Change depth.keep_layers."
            )


def plan_depth(model: Any, layers: Layers, keep: tuple[int, ...]) -> DepthPlan:
    """Find out how a model that keeps some of its decoder layers can be described.

    Args:
        model: a causal language model; looked at only.
        layers: its decoder layers.
        keep: indices of those that stay, in their new order.

    Raises:
        TargetError: if it cannot be.
    """
    cls, config = base_of(model)
    old = getattr(model.config, "llmslim", {}).get("depth")
    of_original = tuple(old["keep"][index] for index in keep) if old else keep
    try:
        return _Search(cls, config, layers.path, of_original).find()
    except ValueError as error:
        raise TargetError(
            f"{layers.path}: {type(model).__name__} cannot keep layers "
            f"{', '.join(map(str, keep))} alone: {error}. Change depth.keep_layers, or leave "
            "`depth` out."
        ) from error


class _Search:
    """Tries configs for an original, without its weights.

    Args:
        cls: class of the original.
        config: its config.
        stack: name of the list of its decoder layers.
        keep: indices of those that stay.
    """

    def __init__(self, cls: Any, config: Any, stack: str, keep: tuple[int, ...]) -> None:
        self._cls, self._config, self._stack, self._keep = cls, config, stack, keep
        self._original = self._build({})
        self._count = len(self._original.get_submodule(stack))  # type: ignore[arg-type]

    def find(self) -> DepthPlan:
        """Return the first description that builds the right model.

        Raises:
            ValueError: if there is none; the message names the reason.
        """
        if self._keep == tuple(range(self._count)):
            return DepthPlan()
        left = self._build({})
        drop_layers(left, self._stack, self._keep)
        counts = self._counts()
        together = [counts] if len(counts) > 1 else []
        groups = [*([name] for name in counts), *together]
        tried, problem = None, ""
        for fields in (fields for names in groups for fields in self._candidates(names)):
            try:
                trial = self._build(fields)
            except Exception as error:  # configs and models check themselves, each in its own way
                problem = problem or f"its config refuses it ({' '.join(str(error).split())[:200]})"
                continue
            attributes = self._following(trial)
            made = copy.deepcopy(left)
            set_fields(made, fields)
            for name, values in attributes.items():
                set_attributes(made.get_submodule(name), values)
            if not first_difference(made, trial):
                return DepthPlan(fields, attributes, notes=self._check_same(made))
            if tried is None or fields.keys() <= tried.fields.keys():
                tried = DepthPlan(fields, attributes)
            if outside := self._outside(trial):
                raise ValueError(f"their number is part of the rest of the model ({outside})")
        if tried is None:
            raise ValueError(problem)
        found = self._recorded(tried)
        set_fields(left, found.fields)
        for name, values in found.attributes.items():
            set_attributes(left.get_submodule(name), values)
        self._check_initialises(left)
        return replace(found, notes=self._check_same(left))

    def _check_initialises(self, made: nn.Module) -> None:
        """Make sure that loading can work out what no file holds, such as rotary frequencies.

        Raises:
            ValueError: if it cannot: Gemma 4's frequencies are looked up by kinds of layers.
        """
        try:
            _initialise(self._original)
        except Exception:  # then it proves nothing for the smaller model
            return
        try:
            _initialise(made)
        except Exception as error:  # each architecture fails in its own way
            raise ValueError(f"its tables need the other layers ({error})") from error

    def _check_same(self, made: nn.Module) -> tuple[str, ...]:
        """Make sure that layers compute at their new places what they computed at their old ones.

        Returns:
            A sentence for the report, where they do not run with a cache.

        Raises:
            ValueError: if they compute something else, or do not run.
        """
        ways: tuple[dict[str, bool], ...] = (
            {},
            {"use_cache": True},
            {"use_cache": True, "one_more": True},
        )
        for options in ways:
            how = " with a cache" if options else ""
            try:
                right = layer_operations(self._original, self._stack, **options)
            except CannotRunError:
                continue  # what is written is compared with what was made all the same
            try:
                found = layer_operations(made, self._stack, **options)
            except CannotRunError as error:
                if not options:
                    raise ValueError(f"what is left does not run ({error})") from error
                kept = ", ".join(map(str, self._keep))
                return (
                    f"{self._stack}: layers {kept} alone do not run with a cache ({error}); "
                    "generate with use_cache=False, or keep a layer with attention.",
                )
            for new, old in enumerate(self._keep):
                after = new == len(found.between) or old == len(right.between)
                if found.inside[new] != right.inside[old] or not (
                    after or found.between[new] == right.between[old]
                ):
                    raise ValueError(f"layer {old} would compute something else elsewhere{how}")
            # Masks for kinds of layers that are gone are not made any more.
            if any(operation not in right.before for operation in found.before):
                raise ValueError(f"layers would be given something else{how}")
        return ()

    def _build(self, fields: Fields) -> nn.Module:
        """Build the original with other fields, from what its config.json would be."""
        config = copy.deepcopy(self._config)
        if fields:
            set_config(config.get_text_config(), fields)
            config = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            model: nn.Module = self._cls(config)
        return model

    def _counts(self) -> list[str]:
        """Return the fields that may count the decoder layers, the usual one first.

        Raises:
            ValueError: if there is none.
        """
        text = self._config.get_text_config()
        known = getattr(text, "num_hidden_layers", None)
        usual = ["num_hidden_layers"] if known == self._count else []
        known = {text.attribute_map.get(name, name) for name in usual}
        others = [
            name
            for name, value in text.to_dict().items()
            if re.search(r"layers?$", name) and value == self._count and name not in known
            if type(value) is int
        ]
        if not usual + others:
            raise ValueError("no field of its config counts them")
        return usual + others

    def _candidates(self, counts: list[str]) -> Iterator[Fields]:
        """Yield changes of the text config that may leave the layers that stay.

        Args:
            counts: fields that count decoder layers.
        """
        base: Fields = dict.fromkeys(counts, len(self._keep))
        several, rest = divmod(self._config.get_text_config().num_hidden_layers, self._count)
        if several > 1 and not rest:  # Longcat counts attentions there, two in each layer
            base["num_hidden_layers"] = several * len(self._keep)
        other: Fields = {}
        indices: Fields = {}
        thresholds: Fields = {}
        places = {old: new for new, old in enumerate(self._keep)}
        for name, value in self._config.get_text_config().to_dict().items():
            if name in base or re.search(r"token|label|architectures", name):
                continue
            if isinstance(value, list) and len(value) == self._count:
                cut = base if re.search(r"layer|block|type|pattern", name) else other
                cut[name] = [value[index] for index in self._keep]
            if isinstance(value, str) and len(value) == self._count and "pattern" in name:
                base[name] = "".join(value[index] for index in self._keep)
            if isinstance(value, Mapping) and value and all(_is_index(key) for key in value):
                base[name] = {
                    type(key)(places[int(key)]): part
                    for key, part in value.items()
                    if int(key) in places
                }
            if _are_indices(name, value, self._count):
                indices[name] = sorted(places[index] for index in value if index in places)
            if type(value) is int and 0 < value <= self._count and re.search(_THRESHOLD, name):
                thresholds[name] = sum(index < value for index in self._keep)
        yield base | other
        if indices:
            yield base | other | indices
        if other:  # as long by chance
            yield base | indices
        if thresholds:
            yield thresholds | base | other | indices

    def _following(self, trial: nn.Module) -> Attributes:
        """Return the attributes outside of the layers that follow the config.

        Numbers with a point are no bookkeeping: they are what the original computes with.
        """
        found: Attributes = {}
        for name, one, other in self._outer(trial):
            for key, old, new in changed_attributes(one, other):
                if _is_json(old) and _is_json(new):
                    found.setdefault(name, {})[key] = new
        return found

    def _outside(self, trial: nn.Module) -> str:
        """Return how modules outside of the layers differ in kind or shape, if they do."""
        ours, theirs = ({n for n, _ in _outer(m, self._stack)} for m in (self._original, trial))
        if ours != theirs:
            return min(ours ^ theirs)
        for name, one, other in self._outer(trial):
            for difference in differences(name, one, other, attributes=False):
                return difference
        return ""

    def _outer(self, trial: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        theirs = dict(_outer(trial, self._stack))
        for name, module in _outer(self._original, self._stack):
            if name in theirs:
                yield name, module, theirs[name]

    def _recorded(self, found: DepthPlan) -> DepthPlan:
        """Return a description by what is changed of the original."""
        text = self._config.get_text_config()
        fields = found.fields | self._derived(text)
        record = {
            "stack": self._stack,
            "keep": list(self._keep),
            "original": {name: getattr(text, name) for name in fields},
            "kept": fields,
            "attributes": found.attributes,
        }
        return DepthPlan(fields, found.attributes, record)

    def _derived(self, text: Any) -> Fields:
        """Return what a config works out for each layer, for those that stay."""
        cls = plain_class(text)
        names = [name for name in dir(cls) if isinstance(getattr(cls, name), property)]
        values = {name: getattr(text, name, None) for name in names}
        return {
            name: [value[index] for index in self._keep]
            for name, value in values.items()
            if isinstance(value, list) and len(value) == self._count
        }


_THRESHOLD = re.compile(r"layer|dense|first")
"""Names of fields that may hold the layer up to which, or from which on, something is done."""


def _initialise(model: Any) -> None:
    """Do what loading does with weights that no file holds; without memory."""
    trial = copy.deepcopy(model)
    for module in trial.modules():  # as loading finds them: building has marked them as done
        forget_initialized(module)
    with torch.device("meta"):
        trial.initialize_weights()


def _outer(model: nn.Module, stack: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if not name.startswith(f"{stack}."):
            yield name, module


def _is_index(key: Any) -> bool:
    return type(key) is int or (isinstance(key, str) and key.isdigit())


def _are_indices(name: str, value: Any, count: int) -> bool:
    """Return whether a field lists indices of layers."""
    return (
        re.search(r"layer|idx|indices|_ids$", name) is not None
        and isinstance(value, list | tuple)
        and bool(value)
        and all(type(each) is int and 0 <= each < count for each in value)
        and len(set(value)) == len(value)
    )


def _is_json(value: Any) -> bool:
    """Return whether a value is made of what bookkeeping is made of."""
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(value[key]) for key in value)
    return value is None or isinstance(value, bool | int | str)
