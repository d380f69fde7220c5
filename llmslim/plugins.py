"""The door for plug-ins: structures, methods of fitting and objectives of healing, by name.

What is built in is a file each, found by the file's name. Another package adds its own by a
decorator below, or by an entry point, which is looked for when names are first needed:

    [project.entry-points."llmslim.structures"]      llmslim.inits, llmslim.objectives
    kronecker = "llmslim_kronecker:Kronecker"

Nothing is imported before it is used by name. No torch: recipes are read with these names and with
the options of the structures. A built-in structure's options are read from its file's text, since
importing the file would import torch; a plug-in's from its class.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, get_type_hints

from llmslim.errors import PluginError

T = TypeVar("T")


class Method(NamedTuple):
    """A method of fitting."""

    name: str
    fits: bool
    """Whether the block approximates the dense map, so that its error means something."""
    fit: Callable[..., None]
    """Fills a block from a `Target`, in place."""
    needs_gram: bool = False
    """Whether it works only where the target has a Gram matrix."""


class Objective(NamedTuple):
    """An objective of healing."""

    name: str
    needs_teacher: bool
    loss: Callable[..., Any]
    """Returns the loss of one `Step`, summed over the tokens that are predicted."""


class Registry(Generic[T]):
    """Things of one kind by name: built in, from entry points, or registered.

    Args:
        kind: what they are, for messages.
        package: whose files are the built-in ones.
        mark: regular expression that such a file's text holds, and no helper's.
        read: returns the thing of a name from its file's module.
        reserved: names that mean something else in a recipe.
    """

    def __init__(
        self,
        kind: str,
        package: str,
        mark: str,
        read: Callable[[ModuleType, str], T],
        reserved: tuple[str, ...] = (),
    ) -> None:
        self.kind, self.package, self.mark = kind, package, mark
        self.read, self.reserved = read, reserved
        self.group = f"llmslim.{kind}s"
        self.registered: dict[str, tuple[T, str]] = {}
        """What was registered, with the dotted name of its home."""

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted({*built_in(self), *self._entry_points(), *self.registered})

    def get(self, name: str) -> T | None:
        """Return what has a name, None where nothing has.

        Raises:
            PluginError: if the plug-in that provides it is broken, or two provide it.
        """
        if name in built_in(self):
            return self.read(importlib.import_module(f"{self.package}.{name}"), name)
        return self.plug_in(name)

    def plug_in(self, name: str) -> T | None:
        """Return what a plug-in gives for a name, None where none does.

        Raises:
            PluginError: as `get` does.
        """
        points = self._entry_points()
        if name not in self.registered and name in points:
            self._import(points[name])
        return self.registered[name][0] if name in self.registered else None

    def register(self, name: Any, thing: T, home: str) -> None:
        """Add one.

        Args:
            name: a plain word in lower case.
            thing: what it stands for.
            home: dotted name of where it is defined; from there it may come again, changed.

        Raises:
            PluginError: if the name is taken, or is none.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise PluginError(
                f"{home}: {self.kind} name {name!r}; a plain word in lower case is needed."
            )
        taken = ""
        if name in self.reserved or (_folder(self.package) / f"{name}.py").exists():
            taken = "llmslim has that name itself"
        elif name in self.registered and self.registered[name][1] != home:
            taken = f"{self.registered[name][1]} has registered it"
        elif (point := self._entry_points().get(name)) and _root(point.value) != _root(home):
            taken = f"it is the entry point {point.value} of {_distribution(point)}"
        if taken:
            raise PluginError(f"{home}: {self.kind} {name!r}; {taken}. Choose another name.")
        self.registered[name] = thing, home

    def _entry_points(self) -> dict[str, metadata.EntryPoint]:
        """Return the entry points by name.

        Raises:
            PluginError: if two have one name, or one has that of a built-in.
        """
        found: dict[str, metadata.EntryPoint] = {}
        for point in _installed(self.group, tuple(sys.path)):
            other = found.setdefault(point.name, point)
            taken = f"{other.value} of {_distribution(other)} has it" if other != point else ""
            if point.name in self.reserved or (_folder(self.package) / f"{point.name}.py").exists():
                taken = "llmslim has that name itself"
            if taken:
                raise PluginError(f"{self._where(point)}: the name is taken; {taken}. Remove one.")
        return found

    def _import(self, point: metadata.EntryPoint) -> None:
        """Import an entry point; a structure need not register itself.

        Raises:
            PluginError: if that fails, or nothing of its name is registered by it.
        """
        try:
            thing = point.load()
            if self is STRUCTURES and isinstance(thing, type):
                register_structure(thing)
        except Exception as error:
            raise PluginError(
                f"{self._where(point)}: cannot be loaded ({type(error).__name__}: {error}). Update "
                f"or uninstall {_distribution(point)}."
            ) from error
        if point.name not in self.registered:
            raise PluginError(
                f"{self._where(point)}: gives no {self.kind} of that name; register_{self.kind} "
                f"must have been called with it. Update or uninstall {_distribution(point)}."
            )

    def _where(self, point: metadata.EntryPoint) -> str:
        return f"{_distribution(point)}: entry point {self.group} {point.name} = {point.value}"


def _class_named(module: ModuleType, name: str) -> Any:
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__dict__.get("name") == name
    )


STRUCTURES: Registry[Any] = Registry(
    "structure",
    "llmslim.modeling",
    r"(?m)^    class Options\b",
    _class_named,
    ("auto", "width", "linear", "conv1d"),
)
INITS: Registry[Method] = Registry(
    "init",
    "llmslim.init",
    r"(?m)^def fit\(",
    lambda module, name: Method(
        name, module.FITS, module.fit, getattr(module, "NEEDS_GRAM", False)
    ),
)
OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    "llmslim.healing.objectives",
    r"(?m)^def loss\(",
    lambda module, name: Objective(name, module.NEEDS_TEACHER, module.loss),
)

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])


def register_structure(cls: C) -> C:
    """Make a structure known under its `name`; returns the class, so it can be a decorator.

    Args:
        cls: a subclass of `llmslim.StructuredLinear` with a `name` and `Options`.

    Raises:
        PluginError: if it is not such a class, or the name is taken.
    """
    home = f"{cls.__module__}.{cls.__qualname__}"
    base = importlib.import_module("llmslim.modeling.structured").StructuredLinear
    dataclass_: Any = getattr(getattr(cls, "Options", None), "__dataclass_params__", None)
    if not issubclass(cls, base) or dataclass_ is None or not dataclass_.frozen:
        raise PluginError(
            f"{home}: no structure; it must be a subclass of StructuredLinear with a frozen "
            "dataclass `Options` in it. See docs/plugins.md."
        )
    STRUCTURES.register(getattr(cls, "name", None), cls, home)
    return cls


def register_init(name: str, *, fits: bool = True, needs_gram: bool = False) -> Callable[[F], F]:
    """Make a method of fitting known: a decorator of a function `fit(block, target)`.

    Args:
        name: as recipes give it for `init`.
        fits: whether the block approximates the dense map at all.
        needs_gram: whether it cannot do without calibration text.

    Raises:
        PluginError: if the name is taken.
    """

    def decorate(fit: F) -> F:
        INITS.register(name, Method(name, fits, fit, needs_gram), _home(fit))
        return fit

    return decorate


def register_objective(name: str, *, needs_teacher: bool = False) -> Callable[[F], F]:
    """Make an objective of healing known: a decorator of a function `loss(step)`.

    Args:
        name: as recipes give it for `heal.objective`.
        needs_teacher: whether it cannot do without the dense model.

    Raises:
        PluginError: if the name is taken.
    """

    def decorate(loss: F) -> F:
        OBJECTIVES.register(name, Objective(name, needs_teacher, loss), _home(loss))
        return loss

    return decorate


@dataclass(frozen=True)
class Option:
    """One option of a structure, as recipes give it."""

    name: str
    kind: Any
    """Its type, as the dataclass has it."""
    default: Any
    """`dataclasses.MISSING` where it must be given."""
    help: str


def structure_options(name: str) -> tuple[Option, ...] | None:
    """Return the options of a structure that recipes can name; None where there is none.

    Raises:
        PluginError: if it is that of a broken plug-in.
    """
    if name in built_in(STRUCTURES):
        return _options_in(built_in(STRUCTURES)[name])
    cls = STRUCTURES.plug_in(name)
    return None if cls is None else describe(cls.Options)


def describe(options: Any, namespace: dict[str, Any] | None = None) -> tuple[Option, ...]:
    """Return the options of a dataclass.

    Args:
        options: a dataclass whose fields are annotated `Annotated[type, "help"]`.
        namespace: where its annotations' names are; its module's own where not given.
    """
    hints = get_type_hints(options, namespace, include_extras=True)
    found = []
    for field in fields(options):
        hint = hints[field.name]
        help_ = next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, str)), "")
        kind = hint.__origin__ if help_ else hint
        found.append(Option(field.name, kind, field.default, help_))
    return tuple(found)


@cache
def _options_in(path: Path) -> tuple[Option, ...]:
    """Return the options of the structure in a file, without running the rest of the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (found,) = (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == "Options")
    sizes = vars(importlib.import_module("llmslim.modeling.sizes"))
    names = {**sizes, "dataclass": dataclass, "Annotated": Annotated, "Literal": Literal}
    exec(compile(ast.Module([found], []), str(path), "exec"), names)
    return describe(names["Options"], names)


@cache
def built_in(registry: Registry[Any]) -> dict[str, Path]:
    """Return the files of what is built in, by name."""
    files = sorted(_folder(registry.package).glob("[a-z]*.py"))
    return {path.stem: path for path in files if re.search(registry.mark, path.read_text("utf-8"))}


@cache
def _installed(group: str, path: tuple[str, ...]) -> tuple[metadata.EntryPoint, ...]:
    del path  # where Python looks: elsewhere there are others
    return tuple(sorted(metadata.entry_points(group=group), key=lambda point: point.value))


def _folder(package: str) -> Path:
    return Path(__file__).parents[1].joinpath(*package.split("."))


def _distribution(point: metadata.EntryPoint) -> str:
    return "an unknown distribution" if point.dist is None else point.dist.name


def _home(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _root(dotted: str) -> str:
    return re.split("[.:]", dotted)[0]
