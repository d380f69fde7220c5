"""What sizes and options mean together: groups, ranks and counts, from integers alone."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmslim.modeling.block_shuffle import BlockShuffle
from llmslim.modeling.grouped_low_rank import GroupedLowRank
from llmslim.modeling.grouped_pointwise import GroupedPointwise
from llmslim.modeling.low_rank import LowRank
from llmslim.modeling.pivoted_low_rank import PivotedLowRank
from llmslim.modeling.sizes import (
    OptionError,
    StaysDense,
    budget,
    check_groups,
    common_divisors,
    groups_for_min_channels,
)
from llmslim.modeling.structured import StructuredLinear, option_values

tried = settings(deadline=None, max_examples=60, derandomize=True)


def resolved_of(
    cls: type[StructuredLinear], inputs: int, outputs: int, **options: Any
) -> dict[str, Any]:
    """Return a structure's options as a checkpoint holds them."""
    return option_values(cls.resolve(inputs, outputs, cls.read_options(options)))


@tried
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 100))
@example(3072, 9216, 256)
@example(3072, 16384, 256)
@example(8192, 3072, 256)
def test_group_rule_is_the_reports(inputs, outputs, least):
    best = 1
    for groups in range(1, min(inputs, outputs) + 1):
        fits = inputs % groups == 0 and outputs % groups == 0
        if fits and groups <= inputs // least:
            best = max(best, groups)
    if best > 1:
        assert groups_for_min_channels(inputs, outputs, least) == best
        asked = GroupedPointwise.Options(min_channels_per_group=least)
        if best == 2:  # two branches of half the weights each: nothing is saved
            with pytest.raises(StaysDense):
                GroupedPointwise.resolve(inputs, outputs, asked)
        else:
            assert GroupedPointwise.resolve(inputs, outputs, asked).groups == best
    else:
        with pytest.raises(StaysDense, match=f"{inputs} and {outputs}"):
            groups_for_min_channels(inputs, outputs, least)
        assert GroupedPointwise(inputs, outputs, min_channels_per_group=least).groups == 1


@tried
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_check_groups_takes_common_divisors_only(inputs, outputs, groups):
    divides = [d for d in range(1, 61) if inputs % d == 0 and outputs % d == 0]
    assert common_divisors(inputs, outputs) == divides
    if groups in divides:
        assert check_groups(inputs, outputs, groups) == groups
    else:
        with pytest.raises(OptionError, match=f"groups {groups} "):
            check_groups(inputs, outputs, groups)


ratios = st.builds(Fraction, st.integers(1, 30), st.integers(1, 30)).filter(lambda r: r <= 1)


@tried
@given(st.integers(1, 96), st.integers(1, 96), ratios, st.sampled_from(["io", "residual"]))
@example(64, 64, Fraction(1, 3), "io")
def test_keep_ratio_picks_the_fewest_groups_within_the_budget(inputs, outputs, ratio, variant):
    def cost(groups):
        block = GroupedPointwise(inputs, outputs, groups=groups, variant=variant, device="meta")
        return sum(p.numel() for p in block.parameters())

    fitting = [
        groups
        for groups in range(1, min(inputs, outputs) + 1)
        if inputs % groups == outputs % groups == 0 and cost(groups) <= ratio * inputs * outputs
    ]
    options = {"keep_ratio": float(ratio), "variant": variant}
    if fitting and fitting[0] > 1:
        resolved = resolved_of(GroupedPointwise, inputs, outputs, **options)
        assert resolved == {
            "groups": fitting[0],
            **({} if variant == "io" else {"variant": variant}),
        }
    else:
        with pytest.raises(StaysDense):
            resolved_of(GroupedPointwise, inputs, outputs, **options)


@tried
@given(st.integers(1, 96), st.integers(1, 96), ratios)
def test_keep_ratio_picks_the_largest_rank_within_the_budget(inputs, outputs, ratio):
    def cost(rank):
        return sum(
            p.numel() for p in LowRank(inputs, outputs, rank=rank, device="meta").parameters()
        )

    ranks = range(1, min(inputs, outputs) + 1)
    fitting = [rank for rank in ranks if cost(rank) <= ratio * inputs * outputs]
    if fitting:
        resolved = resolved_of(LowRank, inputs, outputs, keep_ratio=float(ratio))
        assert resolved == {"rank": max(fitting)}
    else:
        with pytest.raises(StaysDense, match=rf"rank 1 .* {int(ratio * inputs * outputs)} "):
            resolved_of(LowRank, inputs, outputs, keep_ratio=float(ratio))


@tried
@given(st.integers(1, 96), st.integers(1, 96), ratios)
@example(96, 96, Fraction(1, 1))
def test_keep_ratio_picks_the_largest_rank_of_pivots_within_the_budget(inputs, outputs, ratio):
    def cost(rank):
        block = PivotedLowRank(inputs, outputs, rank=rank, device="meta")
        return sum(p.numel() for p in block.parameters())

    ranks = range(1, min(inputs, outputs) + 1)
    fitting = [rank for rank in ranks if cost(rank) <= ratio * inputs * outputs]
    if fitting and max(fitting) < min(inputs, outputs):
        resolved = resolved_of(PivotedLowRank, inputs, outputs, keep_ratio=float(ratio))
        assert resolved == {"rank": max(fitting)}
    else:
        least = f"rank 1 .* {int(ratio * inputs * outputs)} "
        with pytest.raises(StaysDense, match="full rank" if fitting else least):
            resolved_of(PivotedLowRank, inputs, outputs, keep_ratio=float(ratio))


@tried
@given(st.integers(2, 96), st.integers(2, 96), ratios)
def test_keep_ratio_fills_the_budget_of_sums_and_shuffles(inputs, outputs, ratio):
    for cls in (GroupedLowRank, BlockShuffle):
        try:
            resolved = resolved_of(cls, inputs, outputs, keep_ratio=float(ratio))
        except StaysDense:
            continue
        block = cls(inputs, outputs, **resolved, device="meta")
        held = sum(p.numel() for p in block.parameters())
        if cls is GroupedLowRank:
            groups, rank = resolved["groups"], resolved["rank"]
            assert held == 2 * inputs * outputs // groups + rank * (inputs + outputs)
        else:
            inner = resolved["inner_features"] // resolved["blocks"]
            assert held == inner * (inputs + outputs)
        left = ratio * inputs * outputs - held
        assert left >= 0
        if cls is BlockShuffle:
            assert left < inputs + outputs
            divisors = [d for d in range(2, 97) if inputs % d == outputs % d == 0]
            assert resolved["blocks"] == divisors[0]
        else:
            assert left < inputs + outputs or resolved["rank"] == min(inputs, outputs)


def test_the_grouped_part_gets_a_twelfth_of_the_budget():
    resolved = resolved_of(GroupedLowRank, 576, 1536, keep_ratio=0.5)
    assert resolved["groups"] == 48
    assert 2 * 576 * 1536 / 48 == 576 * 1536 / 2 / 12
    assert resolved_of(GroupedLowRank, 576, 1536, keep_ratio=0.5, groups=12)["groups"] == 12


@pytest.mark.parametrize("written", [0.3333, 0.333333, 1 / 3])
def test_a_third_is_a_third_however_it_is_written(written):
    assert budget(3, 5, written) == 5


def test_resolved_options_build_what_they_count():
    for options in ({"groups": 4}, {"min_channels_per_group": 8}, {"keep_ratio": 0.5}, {}):
        resolved = resolved_of(GroupedPointwise, 1024, 2048, **options)
        block = GroupedPointwise(1024, 2048, **resolved, device="meta")
        assert option_values(block.options) == resolved
        assert block.weight.numel() == 2 * 1024 * 2048 // resolved["groups"]
        counted = GroupedPointwise.count_weights(1024, 2048, GroupedPointwise.Options(**options))
        assert block.weight.numel() == counted
    resolved = resolved_of(GroupedPointwise, 8, 8, groups=2, variant="residual", activation="relu")
    assert resolved == {"groups": 2, "variant": "residual", "activation": "relu"}
    assert resolved_of(LowRank, 8, 12, rank=8) == {"rank": 8}


@pytest.mark.parametrize(
    ("structure", "options", "key", "values"),
    [
        (GroupedPointwise, {"groups": 5}, "groups", ["5", "12", "8", "1, 2, 4"]),
        (GroupedPointwise, {"groups": 0}, "groups", ["0", "1, 2, 4"]),
        (GroupedPointwise, {"min_channels_per_group": 0}, "min_channels_per_group", ["0", "1"]),
        (GroupedPointwise, {"groups": 2, "keep_ratio": 0.5}, "", ["groups", "keep_ratio"]),
        (
            GroupedPointwise,
            {"groups": 2, "min_channels_per_group": 2},
            "",
            ["groups", "min_channels_per_group"],
        ),
        (GroupedPointwise, {"variant": "serial"}, "variant", ["'serial'", "io, residual"]),
        (GroupedPointwise, {"groups": 2, "activation": "relu"}, "activation", ["residual"]),
        (
            GroupedPointwise,
            {"groups": 2, "variant": "residual", "activation": "swoosh"},
            "activation",
            ["'swoosh'"],
        ),
        (GroupedPointwise, {"keep_ratio": 0.0}, "keep_ratio", ["0.0"]),
        (GroupedPointwise, {"keep_ratio": 1.5}, "keep_ratio", ["1.5"]),
        (
            GroupedPointwise,
            {"groups": 2, "channel_order": "free"},
            "channel_order",
            ["'free'", "fixed, learned"],
        ),
        (
            GroupedPointwise,
            {"groups": 2, "variant": "residual", "channel_order": "learned"},
            "channel_order",
            ["learned", "io"],
        ),
        (PivotedLowRank, {}, "", ["rank", "keep_ratio"]),
        (PivotedLowRank, {"rank": 2, "keep_ratio": 0.5}, "", ["rank", "keep_ratio"]),
        (PivotedLowRank, {"rank": 9}, "rank", ["9", "1 to 8"]),
        (PivotedLowRank, {"keep_ratio": 1.5}, "keep_ratio", ["1.5"]),
        (GroupedLowRank, {}, "", ["groups", "rank", "keep_ratio"]),
        (GroupedLowRank, {"rank": 2}, "", ["groups", "rank", "keep_ratio"]),
        (
            GroupedLowRank,
            {"groups": 2, "rank": 2, "keep_ratio": 0.5},
            "",
            ["groups", "rank", "keep_ratio"],
        ),
        (GroupedLowRank, {"groups": 5, "rank": 2}, "groups", ["5", "1, 2, 4"]),
        (GroupedLowRank, {"groups": 2, "rank": 9}, "rank", ["9", "1 to 8"]),
        (BlockShuffle, {}, "", ["inner_features", "keep_ratio"]),
        (
            BlockShuffle,
            {"inner_features": 8, "keep_ratio": 0.5},
            "",
            ["inner_features", "keep_ratio"],
        ),
        (BlockShuffle, {"blocks": 5, "keep_ratio": 0.5}, "blocks", ["5", "1, 2, 4"]),
        (BlockShuffle, {"blocks": 4, "inner_features": 6}, "inner_features", ["6", "4", "32"]),
        (BlockShuffle, {"blocks": 4, "inner_features": 36}, "inner_features", ["36", "4", "32"]),
        (LowRank, {}, "", ["rank", "keep_ratio"]),
        (LowRank, {"rank": 2, "keep_ratio": 0.5}, "", ["rank", "keep_ratio"]),
        (LowRank, {"rank": 9}, "rank", ["9", "1 to 8"]),
        (LowRank, {"rank": 0}, "rank", ["0", "1 to 8"]),
    ],
)
def test_wrong_options(structure, options, key, values):
    with pytest.raises(OptionError) as caught:
        resolved_of(structure, 12, 8, **options)
    assert caught.value.key == key
    assert [value for value in values if value not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("structure", "options", "reason"),
    [
        (GroupedPointwise, {"groups": 1}, "one group"),
        (GroupedPointwise, {"keep_ratio": 1.0}, "one group"),
        (
            GroupedPointwise,
            {"keep_ratio": 0.01},
            "groups .* 0 parameters",
        ),
        (GroupedPointwise, {}, " 256 "),
        (LowRank, {"keep_ratio": 0.1}, "rank 1 .* 9 parameters"),
        (PivotedLowRank, {"keep_ratio": 0.1}, "rank 1 .* 9 parameters"),
        (PivotedLowRank, {"rank": 8}, "full rank"),
        (GroupedLowRank, {"groups": 1, "rank": 2}, "one group"),
        (GroupedLowRank, {"groups": 4, "keep_ratio": 0.5}, " 4 groups "),
        (BlockShuffle, {"keep_ratio": 0.1}, "width .* 9 parameters"),
    ],
)
def test_what_stays_dense_says_why(structure, options, reason):
    with pytest.raises(StaysDense, match=reason):
        resolved_of(structure, 12, 8, **options)


def test_coprime_sizes_stay_dense():
    for cls, reason in (
        (BlockShuffle, "9 and 8"),
        (GroupedLowRank, "one group"),
    ):
        with pytest.raises(StaysDense, match=reason):
            resolved_of(cls, 9, 8, keep_ratio=0.5)
