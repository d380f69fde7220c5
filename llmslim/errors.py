"""Every error llmslim raises on purpose.

    SlimError
    ├── RecipeError      (ValueError)    the recipe: file, line, key
    ├── TargetError      (LookupError)   a rule or name that matches nothing in the model
    ├── SizeError        (ValueError)    sizes, groups and ranks that do not fit each other
    ├── CheckpointError  (ValueError)    a folder or file that cannot be read, written or trusted
    │   └── UnfinishedError              work that was interrupted and can be resumed
    ├── DataError        (ValueError)    calibration or training text
    ├── HealingError     (RuntimeError)  training that cannot begin or continue
    └── PluginError      (ImportError)   a plug-in that is broken, or whose name is in use

Messages follow one grammar: *where*: *what was given*; *what is allowed*. *What to do.*
An error may hold several problems that were found together: a sentence for each in `problems`.
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
    """A recipe that cannot be read, or has a key or value that is not allowed."""


class TargetError(SlimError, LookupError):
    """A rule or name that matches nothing in the model, or a module that cannot be replaced."""


class SizeError(SlimError, ValueError):
    """Sizes, groups or ranks that do not fit each other."""


class CheckpointError(SlimError, ValueError):
    """A model folder or file that cannot be read, written or trusted."""


class UnfinishedError(CheckpointError):
    """Work that stopped for lack of disk space or memory, and is kept to be resumed."""


class DataError(SlimError, ValueError):
    """Calibration or training text that cannot be used."""


class HealingError(SlimError, RuntimeError):
    """Training that cannot begin or continue."""


class PluginError(SlimError, ImportError):
    """A plug-in that cannot be imported, registers nothing, or whose name is in use."""


def raise_together(errors: Sequence[SlimError]) -> None:
    """Raise all errors as one; do nothing if there are none.

    Args:
        errors: found independently of each other.

    Raises:
        SlimError: of the class of the first one.
    """
    if errors:
        raise type(errors[0])([sentence for error in errors for sentence in error.problems])


def and_more(names: Sequence[str], shown: int = 1, separator: str = ", ") -> str:
    """Return the first few names, and the number of the others.

    Example:
        >>> and_more(["a", "b", "c", "d"]), and_more(["a", "b"], 2)
        ('a and 3 more', 'a, b')
    """
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return separator.join(names[:shown]) + more


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return text with `?` in place of control characters, which could command a terminal.

    Args:
        text: from any file or person.
        lines: whether to keep line breaks.

    Example:
        >>> printable("a\x1b[2J\nb"), printable("a\nb", lines=True)
        ('a?[2J?b', 'a\nb')
    """
    return "".join(c if c.isprintable() or (lines and c == "\n") else "?" for c in text)
