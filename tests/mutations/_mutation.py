"""One small change to the package that some test must notice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutation:
    """A change of a line or two, of the kind a tired programmer makes."""

    path: str
    """The file, from the repository's root."""
    old: str
    """What stands there now, exactly once."""
    new: str
    """What takes its place."""
    why: str
    """What a user would lose by it."""
    tests: tuple[str, ...]
    """Test files or ids of which one must fail; the likeliest first."""

    def apply(self, source: str) -> str:
        """Return the changed file.

        Args:
            source: the file as it is.

        Raises:
            ValueError: if the old text does not occur exactly once.
        """
        if (count := source.count(self.old)) != 1:
            raise ValueError(f"{self.path}: {self.old!r} occurs {count} times; it must once.")
        return source.replace(self.old, self.new)


def change(path: str, old: str, new: str, why: str, *tests: str) -> Mutation:
    """Return a mutation; arguments as its fields."""
    return Mutation(path, old, new, why, tests)


def stale(mutations: Sequence[Mutation], root: Path) -> list[str]:
    """Return what in a list does not fit the repository, a sentence for each.

    Args:
        mutations: the list.
        root: the repository.
    """
    sources: dict[str, str] = {}

    def read(path: str) -> str:
        if path not in sources:
            file = root / path
            sources[path] = file.read_text(encoding="utf-8") if file.is_file() else ""
        return sources[path]

    found = []
    for mutation in mutations:
        try:
            mutation.apply(read(mutation.path))
        except ValueError as error:
            found.append(str(error))
        for test in mutation.tests:
            path, _, name = test.partition("::")
            if f"def {name.partition('[')[0]}" not in read(path):
                found.append(f"{mutation.path}: {test} is no test.")
    return found
