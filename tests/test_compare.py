"""Comparisons: the numbers of each model's own report, side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_browser import browser
from helpers_cli import ok, run
from helpers_pages import checkpoint, dense_map, layered, write_scores

from llmslim.report.page.comparison import compare, render_comparison
from llmslim.report.read import read_report
from llmslim.report.report import Report


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return two models made from one dense model; the second is not healed."""
    home = tmp_path_factory.mktemp("models")
    first = checkpoint(home / "first", layered(6), perplexity=21.5)
    second = checkpoint(home / "second", layered(6), healed=False, perplexity=30.0)
    write_scores(second, 12.0, text="other.txt")
    return [first, second]


def test_rows_hold_what_each_report_holds(folders: list[Path]) -> None:
    data = json.loads(ok("compare", *folders, "--format", "json"))
    assert (data["models"], data["dense"]) == (["first", "second"], "SmolLM2-135M-Instruct")
    rows = {row["name"]: row for row in data["rows"]}
    totals = read_report(folders[0]).report.totals
    size = rows["non-embedding"]
    assert size["dense"]["mean"] == totals.non_embedding_before
    assert [value["mean"] for value in size["values"]] == [totals.non_embedding_after] * 2
    assert size["best"] is None
    shared = rows["perplexity, w.txt (32 x 512 tokens)"]
    assert [round(value["mean"], 6) for value in shared["values"]] == [21.5, 30.0]
    assert (round(shared["dense"]["mean"], 6), shared["best"]) == (15.2, "first")
    alone = rows["perplexity, other.txt (32 x 512 tokens)"]
    assert alone["values"][0] is None
    assert alone["best"] is None
    assert rows["held-out loss of healing, self"]["values"][0]["mean"] == 3.1
    assert rows["same top token, w.txt (32 x 512 tokens)"]["best"] in ("first", "second")


def test_text_has_one_row_a_line(folders: list[Path]) -> None:
    lines = ok("compare", *folders).splitlines()
    (line,) = [line for line in lines if line.startswith("perplexity, w.txt")]
    assert line.split()[-3:] == ["15.20", "21.50", "30.00"]
    assert lines[0].split() == ["SmolLM2-135M-Instruct", "first", "second"]


def test_the_plot_has_the_dense_model_as_its_mark(folders: list[Path]) -> None:
    plots = dict(compare([read_report(folder) for folder in folders]).plots())
    points = plots["loss, w.txt (32 x 512 tokens)"].points
    assert [(name, target) for name, _, _, target in points] == [
        ("SmolLM2-135M-Instruct", True),
        ("first", False),
        ("second", False),
    ]
    (_, dense_x, dense_y, _), (_, x, y, _), (_, _, worse, _) = points
    assert x < dense_x
    assert dense_y < y < worse


def test_models_of_several_sources_have_no_common_dense_one(
    folders: list[Path], tmp_path: Path
) -> None:
    other = Report("another", "r", (dense_map("layers.0.fc", 8, 8, 0.5),))
    folder = checkpoint(tmp_path / "first", other, healed=False)  # a name that is taken
    found = compare([read_report(folders[0]), read_report(folder)])
    assert found.dense == ""
    assert all(row.dense is None for row in found.rows)
    assert found.names == (str(folders[0]), str(folder))
    for name in ("text", "json", "html"):
        assert render_comparison(found, name)
    with pytest.raises(ValueError, match="'csv'"):
        render_comparison(found, "csv")


def test_the_page_fits_a_phone(folders: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "compare.html"
    ok("compare", *folders, *folders, "-f", "html", "-o", file)
    assert "http" not in file.read_text(encoding="utf-8").replace("http-equiv", "")
    with browser() as chromium:
        for width in (360, 1280):
            chromium.open(file, width)
            assert chromium.script("return document.documentElement.scrollWidth") == width
        dots = chromium.script("return document.querySelectorAll('.dot.target').length")
        assert dots == 3  # the loss of healing, and both texts
        assert chromium.messages() == []


def test_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    assert run("compare", tmp_path / "gone", tmp_path / "gone").exit_code == 1
    assert run("compare").exit_code == 2
