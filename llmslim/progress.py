"""How work that takes long shows how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with how many steps are done, how many there are, and what comes now."""


def quietly(done: int, total: int, what: str) -> None:
    """Show nothing."""
