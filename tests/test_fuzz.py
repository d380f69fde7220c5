"""Damaged and hostile files, many of them: only errors of our own come out, and soon.

The cases are the same in every run. benchmarks/fuzz.py tries as many more as one likes.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hostile_files import (
    DTYPES,
    KINDS,
    NUMBERS,
    RULES,
    check_header,
    check_index,
    check_recipe,
    file_of,
    header_of,
    outcome,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmslim.errors import CheckpointError, RecipeError, SlimError
from llmslim.recipe import Recipe
from llmslim.recipe.schema import Heal


def cases(number: int) -> settings:
    # The database would make a run depend on the ones before it.
    checks = list(HealthCheck)
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=checks,
    )


def survives(check: Callable[[Any, Path], None], content: Any) -> None:
    """Check that content is accepted and means what it says, or is refused by our own error."""
    with TemporaryDirectory() as folder, suppress(SlimError):
        check(content, Path(folder))


@pytest.mark.parametrize(
    ("kind", "number", "refusal"),
    [
        ("recipe", 250, RecipeError),
        ("header", 400, CheckpointError),
        ("index", 300, CheckpointError),
        ("config", 60, CheckpointError),
        ("gguf", 300, CheckpointError),
    ],
)
def test_changed_files_are_refused_or_mean_the_same_to_all(
    kind: str, number: int, refusal: type[SlimError], tmp_path: Path
) -> None:
    counts: Counter[str] = Counter()

    @cases(number)
    @given(st.integers(min_value=0, max_value=1 << 64))
    def run(seed: int) -> None:
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counts[outcome(kind, Random(seed), Path(folder))] += 1

    run()
    # Neither everything nor nothing gets through: the cases reach behind the first check.
    assert counts.keys() <= {"accepted", refusal.__name__}
    assert counts[refusal.__name__] > number / 4
    assert kind == "recipe" or counts["accepted"] > number / 20


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.dates(),
    st.binary(max_size=8),
    st.sampled_from(NUMBERS),
)
SECTIONS = (Recipe, *RULES, Heal)
KEYS = st.sampled_from([key for each in SECTIONS for key in each.model_fields]) | SCALARS
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@cases(150)
@given(st.dictionaries(st.sampled_from(list(Recipe.model_fields)), TREES, max_size=4))
def test_any_tree_under_a_recipes_keys(tree: Any) -> None:
    survives(check_recipe, yaml.safe_dump(tree).encode())
    with suppress(RecipeError):
        Recipe.of(tree)


@cases(150)
@given(st.text(st.sampled_from("ab:-?[]{},#&*!|>'\"%@` \n\t~<.=\\01é\ufeff"), max_size=60))
def test_any_text_as_a_recipe(text: str) -> None:
    survives(check_recipe, text.encode())


@cases(150)
@given(st.binary(max_size=80))
def test_any_bytes_as_a_safetensors_file(content: bytes) -> None:
    survives(check_header, content)
    survives(check_header, file_of(content, 8))


@cases(200)
@given(
    st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(DTYPES),
                "shape": st.lists(st.sampled_from([*NUMBERS, 0, 1, 2]), max_size=3),
                "data_offsets": st.lists(st.sampled_from([*NUMBERS, 4, 8, 16]), max_size=3),
            }
        ),
        max_size=3,
    ),
    st.integers(0, 32),
)
def test_any_numbers_in_a_header(header: Any, data: int) -> None:
    survives(check_header, file_of(json.dumps(header).encode(), data))


@cases(100)
@given(st.dictionaries(st.text(max_size=4), TREES | st.sampled_from(["one.safetensors"])))
def test_any_map_in_an_index(weight_map: Any) -> None:
    survives(
        check_index, json.dumps({"weight_map": weight_map}, default=str, skipkeys=True).encode()
    )


def test_what_is_valid_is_accepted(tmp_path: Path) -> None:
    """Else the fuzzing would prove little."""
    for seed in range(50):
        header, data = header_of(Random(seed))
        check_header(file_of(json.dumps(header).encode(), data), tmp_path)
    files = {"one": "one.safetensors", "two": "two.safetensors"}
    (tmp_path / "model.safetensors").unlink()
    check_index(json.dumps({"weight_map": files}).encode(), tmp_path)
    # Drawn at random, most lengths of a GGUF file are as they should be.
    assert "accepted" in {outcome("gguf", Random(seed), tmp_path) for seed in range(50)}
    assert set(KINDS) == {"recipe", "header", "index", "config", "gguf"}
