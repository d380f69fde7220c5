"""Keep fewer decoder layers: modules, config fields, per-layer lists and cache indices follow."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from llmslim.errors import SlimError, TargetError
from llmslim.recipe import Recipe
from llmslim.surgery.sites import Layers

_INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number")
"""What modules call their own place in the stack; the cache is addressed by it."""


def kept_layers(recipe: Recipe, count: int) -> tuple[int, ...]:
    """Return the indices of the decoder layers that stay.

    A count keeps layers spread evenly from the first to the last: both ends of a decoder do work
    that no other layer repeats.

    Args:
        recipe: its `depth` section, all layers stay without one.
        count: decoder layers of the model.

    Raises:
        RecipeError: if a layer is asked for that the model does not have, or twice.

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


def depth_changes(config: Any, keep: tuple[int, ...], count: int) -> dict[str, Any]:
    """Return the fields of a text config that change when only `keep` of its layers stay.

    Every list with one entry per layer is cut, whatever its name: `layer_types`,
    `no_rope_layers`, per-layer sizes. Lists of token ids are no such list, even if as long.

    Raises:
        TargetError: if the config counts something else than decoder layers.
    """
    if config.num_hidden_layers != count:
        raise TargetError(
            f"depth: num_hidden_layers is {config.num_hidden_layers} where there are {count} "
            "decoder layers, so the config cannot tell of fewer. Leave `depth` out."
        )
    changes: dict[str, Any] = {"num_hidden_layers": len(keep)}
    for key, value in config.to_dict().items():
        per_layer = isinstance(value, list) and len(value) == count
        if per_layer and "token" not in key and key != "architectures":
            changes[key] = [value[index] for index in keep]
    return changes


def drop_layers(model: Any, layers: Layers, keep: tuple[int, ...]) -> None:
    """Keep only the given decoder layers of a model, in place; its config is not touched here.

    Args:
        model: a causal language model.
        layers: where its decoder layers are.
        keep: indices that stay, in their new order.
    """
    stack = model.get_submodule(layers.path)
    kept = nn.ModuleList(stack[index] for index in keep)
    parent, _, leaf = layers.path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, kept)
    for index, layer in enumerate(kept):
        for module in layer.modules():
            for name in _INDEX_NAMES:
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, index)


def apply_changes(config: Any, changes: dict[str, Any]) -> None:
    """Set fields of a text config together, in place.

    One at a time would fail the config's own check that lists are as long as the layer count.

    Raises:
        SlimError: if the config has no field of one of the names.
    """
    for key, value in changes.items():
        real = config.attribute_map.get(key, key)
        if not hasattr(config, real):
            raise SlimError(f"config: no field {key!r} to change.")
        object.__setattr__(config, real, value)
