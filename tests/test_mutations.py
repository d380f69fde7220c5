"""The list of small changes that scripts/mutate makes: it fits the package as it is now."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutations import MUTATIONS, Mutation, stale

ROOT = Path(__file__).parents[1]


def test_every_change_can_be_made_and_names_tests_that_are_there():
    assert not stale(MUTATIONS, ROOT)


def test_every_package_is_changed():
    packages = {path.parent.name for path in ROOT.glob("llmslim/*/__init__.py")}
    assert len(packages) > 8
    assert packages <= {Path(mutation.path).parts[1] for mutation in MUTATIONS}


def test_no_change_leaves_a_file_as_it_is():
    assert all(mutation.old != mutation.new for mutation in MUTATIONS)
    assert len({(one.path, one.old, one.new) for one in MUTATIONS}) == len(MUTATIONS)


def test_a_text_that_is_there_twice_or_not_at_all_is_no_place_for_a_change():
    change = Mutation("x.py", "a = 1", "a = 2", "why", ())
    assert change.apply("a = 1\nb = 1\n") == "a = 2\nb = 1\n"
    for source in ("a = 2", "a = 1\na = 1\n"):
        with pytest.raises(ValueError, match=r"x\.py"):
            change.apply(source)


def test_what_does_not_fit_is_named(tmp_path):
    (tmp_path / "x.py").write_text("a = 1\n")
    (tmp_path / "test_x.py").write_text("def test_a(): ...\n")
    tests = ("test_x.py::test_a[1]", "test_x.py::test_b", "test_y.py")
    change = Mutation("x.py", "a = 1", "a = 2", "why", tests)
    assert [line.partition(": ")[2] for line in stale((change,), tmp_path)] == [
        "test_x.py::test_b is no test.",
        "test_y.py is no test.",
    ]
