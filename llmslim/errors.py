"""Every error llmslim raises on purpose.

    SlimError
    ├── RecipeError      (ValueError)    the recipe: file, line, key
    ├── TargetError      (LookupError)   a rule or a name that fits nothing in the model
    ├── SizeError        (ValueError)    sizes, groups and ranks that do not fit each other
    ├── CheckpointError  (ValueError)    a folder or file that cannot be read, written or trusted
    │   └── UnfinishedError              work that was cut short and can be resumed
    ├── DataError        (ValueError)    calibration or training text
    ├── HealingError     (RuntimeError)  training that cannot continue
    └── PluginError      (ImportError)   a plug-in that is broken, or takes a name that is taken

Messages follow one grammar: *where*: *what was given*; *what is allowed*. *What to do.*
Several problems found together travel in one error: its `problems` has a sentence for each.
"""

from __future__ import annotations

from collections.abc import Sequence


class SlimError(Exception):
    """Base of every error that llmslim raises on purpose.

    Args:
        problems: one sentence, or several that were found together.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (
            (problems,) if isinstance(problems, str) else tuple(problems)
        )
        super().__init__("\n".join(self.problems))


class RecipeError(SlimError, ValueError):
    """A recipe that cannot be read, or holds something that is not allowed."""


class TargetError(SlimError, LookupError):
    """A rule or name that fits nothing in the model, or a module that cannot be replaced."""


class SizeError(SlimError, ValueError):
    """Sizes, groups or ranks that do not fit each other."""


class CheckpointError(SlimError, ValueError):
    """A model folder or file that cannot be read, written or trusted."""


class UnfinishedError(CheckpointError):
    """Work that a disk or a memory cut short, not a mistake: what is done is kept for a resume."""


class DataError(SlimError, ValueError):
    """Calibration or training text that cannot be used."""


class HealingError(SlimError, RuntimeError):
    """Training that cannot continue."""


class PluginError(SlimError, ImportError):
    """A plug-in that cannot be imported, registers nothing, or takes a name that is taken."""


def raise_together(errors: Sequence[SlimError]) -> None:
    """Raise all of `errors` as one; do nothing when there are none.

    Args:
        errors: problems found independently of each other.

    Raises:
        SlimError: of the class that all errors share, else of the first one's class.
    """
    if errors:
        raise type(errors[0])([sentence for error in errors for sentence in error.problems])


def and_more(names: Sequence[str], shown: int = 1, separator: str = ", ") -> str:
    """Return the first few of some names, and how many more there are.

    Example:
        >>> and_more(["a", "b", "c", "d"]), and_more(["a", "b"], 2)
        ('a and 3 more', 'a, b')
    """
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return separator.join(names[:shown]) + more


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return text that no terminal takes for a command: a `?` in place of each such character.

    Args:
        text: from anyone.
        lines: whether it may have several lines.

    Example:
        >>> printable("a\x1b[2J\nb"), printable("a\nb", lines=True)
        ('a?[2J?b', 'a\nb')
    """
    return "".join(c if c.isprintable() or (lines and c == "\n") else "?" for c in text)
