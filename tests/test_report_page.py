"""The HTML page of a report: what it says, and what a browser makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers_browser import Browser, browser
from helpers_cli import ok
from helpers_pages import PROMPTS, checkpoint, dense_map, layered

from llmslim.errors import CheckpointError
from llmslim.report import render
from llmslim.report.page.charts import Axis, thinned
from llmslim.report.page.heat import heat_maps
from llmslim.report.page.html import report_page
from llmslim.report.read import read_report
from llmslim.report.report import Report


class Outline(HTMLParser):
    """Text of a page, its tags, and everything that it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("pages") / "small-one", layered(12))


def test_a_page_says_what_is_known(healed: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    ok("report", healed, "--format", "html", "-o", file)
    page = Outline(file.read_text(encoding="utf-8"))
    totals = read_report(healed).report.totals
    kept = totals.non_embedding_after / totals.non_embedding_before
    wanted = [
        f"{100 * kept:.1f} %",
        "21.50",  # perplexity, that of the dense model, and its interval
        "15.20",
        "3.1000",  # held-out losses: healed, before, dense
        "4.6000",
        "2.6000",
        PROMPTS[1],  # with its angle brackets as words
        "Paris.",
        "no rule matches",
        "--seed 7",
        "llmslim heal mlp-half",
        "structure: auto",
        "0f" * 32,
    ]
    assert [words for words in wanted if words not in page.text] == []


def test_a_page_fetches_nothing(healed: Path) -> None:
    page = report_page(read_report(healed))
    tags = Outline(page).tags
    assert not [tag for tag, _ in tags if tag in ("img", "iframe", "object", "embed")]
    assert not [given for tag, given in tags if tag == "script" and given]
    links = [value for _, given in tags for key in ("href", "src") if (value := given.get(key))]
    assert links == ["data:,"]
    assert not re.search(r"url\(|@import|https?:", page)


def test_words_from_outside_stay_words(tmp_path: Path) -> None:
    odd = "</script><script>x</script>\x1b[2J"
    row = dense_map(f"layers.0.{odd}", 8, 8, 0.5, reason=odd, options={odd: odd})
    folder = checkpoint(tmp_path / "odd", Report(odd, odd, (row,), (odd,), odd))
    (folder / "recipe.yaml").write_text(odd)
    page = report_page(read_report(folder))
    plain = report_page(read_report(checkpoint(tmp_path / "plain", layered(1))))
    assert page.count("<script>") == plain.count("<script>") == 1
    assert "\x1b" not in page


def test_the_map_has_every_projection_of_every_layer_once() -> None:
    report = layered(6, experts=3)
    (found,) = heat_maps(report)
    assert (found.stack, [home for home, _ in found.groups]) == (
        "model.layers",
        ["self_attn", "mlp.experts.*"],
    )
    assert [count for _, count in found.groups] == [4, 3]
    lines = [cell.line for layer in found.layers for cell in layer.cells if cell]
    names = [row.name for line in lines for row in line.rows]
    assert sorted(names) == sorted(row.name for row in report.rows if row.kind == "projection")
    for layer in found.layers:
        inside = [row for row in report.rows if f".layers.{layer.index}." in row.name]
        assert layer.before == sum(row.params_before for row in inside)
        assert layer.after == sum(row.params_after for row in inside)
    first = found.layers[0].cells[4]
    assert first is not None
    assert (first.state, len(first.line.rows)) == ("changed", 3)
    assert first.removed == pytest.approx(0.05, abs=1e-3)
    assert max(cell.heat for layer in found.layers for cell in layer.cells if cell) == 1


def test_widened_and_unmatched_places_have_no_colour() -> None:
    wide = dense_map("layers.0.fc", 8, 8, 2.0)
    (found,) = heat_maps(Report("m", "r", (wide, dense_map("layers.0.up", 8, 8))))
    cells = [cell for cell in found.layers[0].cells if cell]
    assert [(cell.removed, cell.error, cell.state) for cell in cells] == [
        (0.0, None, "changed"),
        (0.0, None, "same"),
    ]


@pytest.mark.parametrize("values", [(0, 1), (3.2, 3.21), (-5, 12_000), (7, 7), (0, 0)])
def test_ticks_are_round_and_inside(values: tuple[float, ...]) -> None:
    axis = Axis.over(values, "x")
    assert 2 <= len(axis.ticks) <= 8
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert axis.at(axis.low) == 0
    assert axis.at(axis.high) == 100


def test_a_long_line_keeps_its_mean() -> None:
    points = [(float(n), float(n % 7)) for n in range(10_000)]
    few = thinned(points)
    assert len(few) <= 400
    for axis in (0, 1):
        mean = sum(point[axis] for point in few) / len(few)
        assert mean == pytest.approx(sum(p[axis] for p in points) / len(points), rel=1e-2)


@pytest.mark.parametrize("report", [layered(32), layered(12, experts=128), Report("m", "r", ())])
def test_large_and_empty_reports_stay_small(report: Report) -> None:
    page = render(report, "html")
    assert len(page.encode()) < 2_000_000
    assert Outline(page).text.count("unmatched") >= bool(report.rows)


@pytest.mark.parametrize(("objective", "charts"), [("cross_entropy", 1), ("logits", 2)])
def test_losses_of_two_kinds_have_two_charts(tmp_path: Path, objective: str, charts: int) -> None:
    folder = checkpoint(tmp_path / "slim", layered(1))
    file = folder / "llmslim_report.json"
    data = json.loads(file.read_text())
    data["healing"]["objective"] = objective
    file.write_text(json.dumps(data))
    page = Outline(report_page(read_report(folder)))
    assert len([tag for tag, given in page.tags if given.get("class") == "plot"]) == charts
    assert len([tag for tag, _ in page.tags if tag == "polyline"]) == 2


def test_a_history_that_is_none_is_an_error(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "odd", layered(1))
    (folder / "healing_history.jsonl").write_text('{"step": 1')
    with pytest.raises(CheckpointError, match=r"healing_history\.jsonl"):
        report_page(read_report(folder))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def page(healed: Path) -> Path:
    file = healed.parent / "page.html"
    file.write_text(report_page(read_report(healed)), encoding="utf-8")
    return file


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 820, 1280])
def test_no_width_overflows(chromium: Browser, page: Path, width: int, dark: bool) -> None:
    chromium.open(page, width, dark=dark)
    seen = chromium.script(
        "return [document.documentElement.scrollWidth, innerWidth,"
        " getComputedStyle(document.body).backgroundColor]"
    )
    assert seen[:2] == [width, width]
    brightness = sum(map(int, re.findall(r"\d+", seen[2])))
    assert (brightness < 200) is dark
    assert chromium.messages() == []


@pytest.mark.parametrize("shown", ["kept", "error"])
@pytest.mark.parametrize("dark", [False, True])
def test_every_word_stands_out(chromium: Browser, page: Path, dark: bool, shown: str) -> None:
    chromium.open(page, 1280, dark=dark)
    click(chromium, f"[data-heat={shown}]")
    found = chromium.contrasts()
    assert len(found) > 200
    assert min(found)[0] >= 4.5, min(found)  # level AA of WCAG


def column(chromium: Browser, number: int) -> list[str]:
    rows = "document.querySelectorAll('.modules tbody:not([hidden]) tr')"
    found = chromium.script(f"return [...{rows}].map((row) => row.cells[{number}].dataset.value)")
    return list(found)


def click(chromium: Browser, selector: str) -> None:
    chromium.script(f"document.querySelector({json.dumps(selector)}).click()")


def test_the_table_sorts_both_ways(chromium: Browser, page: Path) -> None:
    chromium.open(page, 1280)
    before = [float(value) for value in column(chromium, 4)]
    head = ".modules thead th:nth-child(5) button"
    click(chromium, head)
    assert [float(value) for value in column(chromium, 4)] == sorted(before, reverse=True)
    click(chromium, head)
    assert [float(value) for value in column(chromium, 4)] == sorted(before)
    sorts = "return [...document.querySelectorAll('.modules th[aria-sort]')].map((h) => h.ariaSort)"
    assert chromium.script(sorts) == ["ascending"]
    click(chromium, ".modules thead th:nth-child(1) button")
    names = chromium.script(
        "return [...document.querySelectorAll('.modules tbody:not([hidden]) th')]"
        ".map((cell) => cell.textContent.trim())"
    )
    assert names[0] == "lm_head"
    # Numbers in names count as numbers.
    places = [names.index(f"model.layers.{layer}.mlp.up_proj") for layer in (2, 10)]
    assert places == sorted(places)
    assert chromium.messages() == []


def test_every_module_is_shown_when_asked_for(chromium: Browser, page: Path) -> None:
    chromium.open(page, 360)
    folded = len(column(chromium, 4))
    click(chromium, "[data-rows=every]")
    report = layered(12)
    assert len(column(chromium, 4)) == len(report.rows) > folded
    visible: Any = (
        "return [...document.querySelectorAll('.modules tbody:not([hidden]) tr')]"
        ".filter((row) => row.offsetHeight).length"
    )
    assert chromium.script(visible) == 12
    click(chromium, "[data-more]")
    assert chromium.script(visible) == len(report.rows)
    assert chromium.script("return document.documentElement.scrollWidth") == 360
    assert chromium.messages() == []


def test_the_map_and_the_theme_switch(chromium: Browser, page: Path) -> None:
    chromium.open(page, 820)
    shown = (
        "const cell = document.querySelector('.cell[style]');"
        " return [cell.innerText, getComputedStyle(cell).backgroundColor]"
    )
    kept = chromium.script(shown)
    click(chromium, "[data-heat=error]")
    error = chromium.script(shown)
    assert (kept[0], error[0]) == ("95", "0.10")
    assert kept[1] != error[1]
    paper = "return getComputedStyle(document.body).backgroundColor"
    light = chromium.script(paper)
    click(chromium, "[data-theme-toggle]")
    assert chromium.script(paper) != light
    click(chromium, "[data-theme-toggle]")
    assert chromium.script(paper) == light
    assert chromium.messages() == []
