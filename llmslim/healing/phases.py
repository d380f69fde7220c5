"""Which objectives a healing has, one after the other, and whether the teacher fits them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from llmslim.errors import HealingError
from llmslim.healing.objectives import Objective, objective_named
from llmslim.recipe import Heal
from llmslim.surgery.sites import find_layers


def chosen_phases(spec: Heal, teacher: Any) -> list[tuple[Objective, float]]:
    """Return the objectives in their order, each with the share of the steps that it ends at.

    Raises:
        HealingError: if one is not known, or needs a teacher and there is none.
    """
    name = spec.objective or ("cross_entropy" if teacher is None else "logits")
    chosen = [(objective_named(name), 1.0)]
    if spec.layers_share:
        chosen.insert(0, (objective_named("layers"), spec.layers_share))
    if spec.store_teacher:
        if teacher is None:
            raise HealingError(
                "heal.store_teacher: true, but no teacher to store. Name one (--teacher), or leave "
                "store_teacher out."
            )
        if [objective.name for objective, _ in chosen] != ["logits"]:
            raise HealingError(
                f"heal.store_teacher: true with {', '.join(one.name for one, _ in chosen)}; only "
                "the teacher's logits are stored, for objective `logits` alone. Leave "
                "store_teacher out, or the other objectives."
            )
    for objective, _ in chosen:
        if objective.needs_teacher and teacher is None:
            raise HealingError(
                f"heal.objective: {objective.name}, but no teacher; it learns from the dense "
                "model. Name one (--teacher), or take cross_entropy."
            )
    return chosen


def checked_phases(
    model: Any, text: Any, spec: Heal, teacher: Any
) -> list[tuple[Objective, float]]:
    """Return the objectives, as `chosen_phases`, of a healing that can begin.

    Raises:
        HealingError: if objective, teacher and text do not go together.
    """
    chosen = chosen_phases(spec, teacher)
    if teacher is not None:
        check_vocabulary(model, teacher)
    if len(text.train) == 0:
        raise HealingError("heal.data: no text to train on; at least one row is needed.")
    return chosen


def uses_layers(phases: list[tuple[Objective, int]]) -> bool:
    """Return whether the teacher's layers are matched in any of the steps."""
    return any(objective.name == "layers" and end > 0 for objective, end in phases)


def paired_layers(
    model: Any,
    teacher: Any,
    which: Sequence[int] | None,
    *,
    key: str = "heal.objective: layers",
    instead: str = "Use `logits`.",
) -> tuple[tuple[nn.Module, nn.Module], ...]:
    """Return every decoder layer with the teacher's that it stands for.

    Args:
        model: in training.
        teacher: the dense model.
        which: the teacher's layers in the model's order; all by default.
        key: what needs to know, for the message.
        instead: what to do where it is not known, for the message.

    Raises:
        HealingError: if that is not known.
    """
    ours = list(model.get_submodule(find_layers(model).path))
    theirs = list(teacher.get_submodule(find_layers(teacher).path))
    which = range(len(theirs)) if which is None else which
    if len(ours) != len(which) or max(which) >= len(theirs):
        raise HealingError(
            f"{key}, but the model has {len(ours)} layers and the teacher "
            f"{len(theirs)}; which stand for which is known only from the recipe of the "
            f"checkpoint. {instead}"
        )
    return tuple((one, theirs[index]) for one, index in zip(ours, which, strict=True))


def check_vocabulary(model: Any, teacher: Any) -> None:
    """Refuse a teacher that speaks of other tokens.

    Raises:
        HealingError: if the vocabularies are of different sizes.
    """
    ours, theirs = (m.get_output_embeddings().weight.shape[0] for m in (model, teacher))
    if ours != theirs:
        raise HealingError(
            f"heal.teacher: a vocabulary of {theirs:,} tokens, the model's has {ours:,}; both need "
            "the same. Give the model that this one was made from."
        )
