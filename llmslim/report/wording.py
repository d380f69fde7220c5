"""How numbers, options and shapes are written in every view for people."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from llmslim.errors import printable
from llmslim.options import ConvertOptions, recorded_words
from llmslim.report.report import WIDTH, Report, Row, Totals

from .lines import Line

AGAIN = (
    "With the same versions, on the same kind of device, these commands give the same weights. "
    "Paths are as they were given, absolute ones without their folders."
)
"""What is to be known of `commands`."""

_SHORT_OPTIONS = {"groups": "G", "rank": "r"}
_BARE_OPTIONS = ("variant", "activation")


def short(number: int) -> str:
    """Write a count in three digits.

    Example:
        >>> short(576), short(26_542_080), short(3_624_078_336), short(999_999)
        ('576', '26.5M', '3.62B', '1.00M')
    """
    if number < 1000:
        return str(number)
    scaled, suffix = number / 1000, "k"
    for larger in ("M", "B", "T"):
        if scaled < 999.5:
            break
        scaled, suffix = scaled / 1000, larger
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:.{digits}f}{suffix}"


def size(count: int) -> str:
    """Write a number of bytes in a fitting unit.

    Example:
        >>> size(512), size(269 * 2**20), size(7 * 2**30)
        ('512 B', '269.0 MiB', '7.00 GiB')
    """
    for bits, unit, digits in ((30, "GiB", 2), (20, "MiB", 1), (10, "KiB", 1)):
        if count >= 1 << bits:
            return f"{count / (1 << bits):.{digits}f} {unit}"
    return f"{count} B"


def percent(after: int, before: int, digits: int = 1) -> str:
    """Write the share of `before` that is left; a dash where there was nothing.

    Example:
        >>> percent(1, 3), percent(654_511_104, 3_624_078_336, 2), percent(0, 0)
        ('33.3 %', '18.06 %', '-')
    """
    return f"{100 * after / before:.{digits}f} %" if before else "-"


def action(row: Row) -> str:
    """Return the word for what became of a row: a block that is only narrower is `resized`.

    Example:
        >>> action(Row("up", "projection", "replaced", structure="width"))
        'resized'
    """
    return "resized" if row.structure == WIDTH else printable(row.action)


def structure(row: Row) -> str:
    """Write a row's block with its options, or why there is none.

    Example:
        >>> options = {"groups": 4, "variant": "io"}
        >>> structure(Row("up", "projection", "replaced", "", "grouped_pointwise", options))
        'grouped_pointwise io G=4'
    """
    if row.action == "dropped":  # action and name are enough
        return ""
    if row.structure is None:
        return printable(row.reason)
    block = " ".join([row.structure, *_options(row.options)])
    return printable(f"{block}; {row.reason}" if row.reason else block)


def _options(options: dict[str, Any]) -> list[str]:
    given = {name: value for name, value in options.items() if value is not None}
    bare = [str(given[name]) for name in _BARE_OPTIONS if name in given]
    rest = [
        f"{_SHORT_OPTIONS.get(name, name)}={value}"
        for name, value in given.items()
        if name not in _BARE_OPTIONS
    ]
    return bare + rest


def shape(row: Row) -> str:
    """Write out x in, the shape of `nn.Linear.weight`; empty for rows without a dense map."""
    if row.in_features is None or row.out_features is None:
        return ""
    return f"{row.out_features}x{row.in_features}"


def error(line: Line) -> str:
    """Write a line's fitting error, as a range where its rows differ.

    Example:
        >>> rows = [Row("up", "projection", "replaced", init_error=e) for e in (0.2, 0.452)]
        >>> error(Line("up", tuple(rows)))
        '0.200-0.452'
    """
    shown = [f"{value:.3f}" for value in sorted(line.init_errors)]
    return "-".join(dict.fromkeys([shown[0], shown[-1]])) if shown else ""


def mean_error(line: Line) -> str:
    """Write the mean of a line's fitting errors, where a range would be too wide."""
    errors = line.init_errors
    return f"{sum(errors) / len(errors):.3f}" if errors else ""


def title(report: Report) -> str:
    """Return the report's headline."""
    totals = report.totals
    kept = percent(totals.non_embedding_after, totals.non_embedding_before, 2)
    names = printable(f"{report.model or 'model'} with {report.recipe}")
    return f"{names}: {kept} of the non-embedding parameters"


def fitted_to(report: Report) -> str:
    """Return a sentence on the text that blocks were fitted to."""
    return f"Fitted to {printable(report.fitted_to)}."


def commands(report: Report, recipe: str, *, healed: bool) -> list[str]:
    """Return the commands that make a model again; none where no conversion made it.

    Args:
        report: of the model.
        recipe: file with the recipe that is stored beside it.
        healed: whether it was trained after the conversion, as that recipe says.

    Example:
        >>> commands(Report("a", "half", (), given="me/a"), "recipe.yaml", healed=False)
        ['llmslim convert me/a --recipe recipe.yaml --out half']
    """
    if not report.given:
        return []
    name = report.recipe or "slim"
    options = recorded_words(ConvertOptions, report.options)
    found = [["convert", report.given, "--recipe", recipe, *options, "--out", name]]
    if healed:
        found.append(["heal", name, "--out", f"{name}-healed"])
    return [printable(shlex.join(["llmslim", *words])) for words in found]


def totals_rows(totals: Totals) -> tuple[tuple[str, Callable[[int], str], int, int], ...]:
    """Return the totals as rows of what, how to write it, before and after."""
    t, exact = totals, "{:,}".format
    return (
        ("parameters", exact, t.params_before, t.params_after),
        ("non-embedding", exact, t.non_embedding_before, t.non_embedding_after),
        ("bytes", size, t.bytes_before, t.bytes_after),
        ("flops per token", short, t.flops_per_token_before, t.flops_per_token_after),
    )


def totals_table(totals: Totals) -> list[tuple[str, str, str, str]]:
    """Return the totals as rows of what, before, after and share kept."""
    return [
        (what, write(before), write(after), percent(after, before, 2))
        for what, write, before, after in totals_rows(totals)
    ]
