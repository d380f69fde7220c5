"""What results look like in a shell and in a notebook."""

from __future__ import annotations

import webbrowser
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers_pages import checkpoint, healing, layered
from tiny import tiny_model

import llmslim
from llmslim.errors import CheckpointError
from llmslim.healing.report import Answer, HealReport
from llmslim.report.page.html import report_page
from llmslim.report.read import read_report
from llmslim.report.report import Report

RULE = {"match": "*.mlp.*", "structure": "low_rank", "rank": 4}


class Cells(HTMLParser):
    """The texts of a fragment's cells, by row; fails where a tag is not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def healed(path: Path | None) -> HealReport:
    known = {key: value for key, value in healing().items() if key != "gap_closed"}
    answers = tuple(Answer(**one) for one in known.pop("answers"))
    return HealReport(
        path=path, history=({"step": 1, "loss": 2.0},) * 5000, answers=answers, **known
    )


@pytest.mark.parametrize("size", [1, 30, 100])
def test_a_report_in_a_shell_is_ten_lines(size: int) -> None:
    report = layered(size)
    for text in (str(report), repr(report)):
        lines = text.splitlines()
        assert len(lines) <= 10
        assert max(map(len, lines)) <= 120
        assert f"{report.totals.params_after:,}" in text
    assert len(str(Report("m", "r", ())).splitlines()) <= 10


def test_a_report_in_a_notebook_is_tables() -> None:
    report = layered(3)
    rows = Cells(report._repr_html_()).rows
    totals = {row[0]: row[1:] for row in rows if row[0] == "non-embedding"}
    assert totals["non-embedding"][:2] == [
        f"{report.totals.non_embedding_before:,}",
        f"{report.totals.non_embedding_after:,}",
    ]
    assert ["model.embed_tokens", "1", "kept"] in [row[:3] for row in rows]
    assert len(layered(100)._repr_html_()) < 30_000
    odd = Report("<script>", "r", report.rows, ("<img src=x>",))
    assert "<script>" not in odd._repr_html_()
    assert "<img" not in odd._repr_html_()


def test_a_plan_shows_as_its_report() -> None:
    made = llmslim.plan(tiny_model(), {"replace": [RULE]})
    report = made.report()
    assert (repr(made), made._repr_html_()) == (repr(report), report._repr_html_())
    done = llmslim.Conversion(Path("x"), report)
    assert repr(done).splitlines()[:-1] == repr(report).splitlines()
    assert done._repr_html_() == report._repr_html_()


def test_a_healing_shows_what_came_of_it() -> None:
    for path in (None, Path("slim-healed")):
        report = healed(path)
        lines = str(report).splitlines()
        assert len(lines) <= 10
        values = {row[0]: row[1] for row in Cells(report._repr_html_()).rows}
        assert values["held-out loss after"] == "3.1000"
        assert all(
            any(name in line and value in line for line in lines) for name, value in values.items()
        )
        assert ("slim-healed" in lines[0]) is (path is not None)


def test_show_opens_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    made = llmslim.plan(tiny_model(), {"replace": [RULE]})
    for one in (made, made.report()):
        path = one.show()
        assert opened.pop() == path.as_uri()
        assert "model.layers.0.mlp" in path.read_text(encoding="utf-8")
        path.unlink()


def test_what_is_in_a_folder_is_shown_with_all_beside_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    folder = checkpoint(tmp_path / "slim-healed", layered(2))
    for one in (healed(folder), llmslim.Conversion(folder, layered(2))):
        path = one.show()
        assert opened.pop() == path.as_uri()
        assert path.read_text(encoding="utf-8") == report_page(read_report(folder))
        path.unlink()
    with pytest.raises(CheckpointError):
        healed(None).show()
    assert opened == []
