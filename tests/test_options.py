"""Keywords in Python and options on the command line are the fields of one dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner
from tiny import tiny_model

import llmslim
from llmslim.cli.commands import heal
from llmslim.cli.options import options_from
from llmslim.options import HealOptions, takes
from llmslim.recipe import Heal


@dataclass(frozen=True)
class Cut:
    """Options of a cut.

    Attributes:
        out: Where to write, on a line
            and another.
        depth: How deep.
        how: Which way.
        fast: Whether to hurry.
        others: Anything else.
        tool: What to cut with.
    """

    out: str | Path | None = field(default=None, metadata={"flags": ("-o", "--out")})
    depth: int = field(default=7, metadata={"metavar": "MM"})
    how: Literal["long", "across"] | None = None
    fast: bool = False
    others: Mapping[str, Any] | None = field(default=None, metadata={"flags": ("--set",)})
    tool: Any = field(default=None, metadata={"flags": ()})


@click.command()
@options_from(Cut)
def cut(**options):
    click.echo(repr(Cut(**options)))


def test_a_command_makes_the_dataclass():
    given = ["-o", "x", "--depth", "3", "--how", "long", "--fast", "--set", "a=1", "--set", "b=[2]"]
    made = Cut("x", 3, "long", fast=True, others={"a": 1, "b": [2]})
    assert CliRunner().invoke(cut, given).output == f"{made!r}\n"
    assert CliRunner().invoke(cut, []).output == f"{Cut(others={})!r}\n"


def test_its_help_is_the_docstring():
    lines = [
        " ".join(line.split()) for line in CliRunner().invoke(cut, ["--help"]).output.split("\n")
    ]
    assert "-o, --out TEXT Where to write, on a line and another." in lines
    assert "--depth MM How deep. [default: 7]" in lines
    assert "--how [long|across] Which way." in lines
    assert "--fast Whether to hurry." in lines
    assert not any("tool" in line for line in lines)


@pytest.mark.parametrize("given", [["--depth", "x"], ["--how", "x"], ["--set", "x"]])
def test_values_of_another_type_are_refused(given):
    assert CliRunner().invoke(cut, given).exit_code == 2


def test_keywords_are_the_fields():
    @takes(Cut)
    def saw(model, options):
        return model, options

    assert saw("oak", "x", depth=2) == ("oak", Cut("x", 2))
    assert list(inspect.signature(saw).parameters) == ["model", *(one.name for one in fields(Cut))]
    with pytest.raises(TypeError):
        saw("oak", width=2)


@pytest.mark.parametrize("verb", [llmslim.heal, llmslim.plan_heal])
def test_healing_takes_the_same_from_python_and_the_command_line(verb):
    names = [one.name for one in fields(HealOptions)]
    assert list(inspect.signature(verb).parameters) == ["model", *names]
    # The group gives -v, -q and --debug to every command.
    every = ("verbose", "quiet", "debug")
    shown = {one.name: one for one in heal.command.params if one.name not in every}
    own = {"model", "out_given", "dry_run", "json_target"}
    assert shown.keys() == {*own, *names} - {"tokenizer", "progress"}
    assert all(shown[name].help for name in shown.keys() - {"model", "out_given"})


def test_what_is_given_replaces_keys_of_the_section():
    options = HealOptions(data=Path("rows.jsonl"), teacher="dense", tokens=5, settings={"top_k": 2})
    expected = {"data": "rows.jsonl", "teacher": "dense", "tokens": 5, "top_k": 2}
    assert options.changes() == expected
    assert expected.keys() <= Heal.model_fields.keys()
    assert HealOptions(seed=3, settings={"seed": 2}).changes() == {"seed": 3}
    assert HealOptions(teacher=tiny_model()).changes() == {"teacher": None}
    rows = type("Rows", (), {"train": [], "held_out": []})()
    assert HealOptions(data=rows).changes() == {}
