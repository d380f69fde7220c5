"""The roles that a projection can have in a decoder layer, as recipes name them.

Which projection of a model has which role is found by `llmslim.anatomy.roles`; here are the names
alone, and what they mean to a rule.
"""

from __future__ import annotations

import difflib

_MLP = ("gate", "up", "gate_up", "down")
_PARTS = {
    "mlp": _MLP,
    "attention": ("q", "k", "v", "qkv", "kv", "o"),
    "experts": _MLP,
    "shared_experts": _MLP,
    "ssm": ("in", "out"),
}

ROLES: tuple[str, ...] = tuple(
    role for whole, parts in _PARTS.items() for role in (whole, *(f"{whole}.{p}" for p in parts))
)
"""Every role, each whole before its parts."""


def plays(role: str, wanted: str) -> bool:
    """Return whether a projection of one role is meant by another: the same, or the whole of it.

    Example:
        >>> plays("mlp.up", "mlp"), plays("mlp", "mlp.up"), plays("", "mlp")
        (True, False, False)
    """
    return role == wanted or role.startswith(f"{wanted}.")


def known_role(name: str) -> str:
    """Return a role's name as it is.

    Raises:
        ValueError: if there is no such role.
    """
    if name not in ROLES:
        close = difflib.get_close_matches(name, ROLES, n=1)
        meant = f". Did you mean {close[0]}?" if close else ""
        raise ValueError(f"allowed {', '.join(ROLES)}{meant}")
    return name
