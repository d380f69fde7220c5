"""Views of a report: golden files for their looks, arithmetic of their own for their numbers."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml
from helpers_pages import projection
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from llmslim.errors import CheckpointError
from llmslim.report import FORMATS, render
from llmslim.report.bars import layer_params
from llmslim.report.card import model_card
from llmslim.report.lines import fold, unfolded
from llmslim.report.read import read_report
from llmslim.report.report import Report, Row
from llmslim.report.text import TextView
from llmslim.storage import Origin

FITTED_TO = "61,440 tokens of [b]a.txt[/b], with errors measured on 4,096 others"
GOLDEN = Path(__file__).parent / "golden"
ACTIONS = {"replaced", "kept", "unmatched", "tied", "dropped"}


def sample() -> Report:
    """Return a report with every action, a fold that is no full grid, and hostile words."""
    io_block = {"structure": "grouped_pointwise", "options": {"groups": 4, "variant": "io"}}
    low_rank = {"structure": "low_rank", "options": {"rank": 96}}
    embedding = 49152 * 576
    rows = [
        Row(
            "model.embed_tokens",
            "embedding",
            "kept",
            "an embedding",
            params_before=embedding,
            params_after=embedding,
            bytes_before=2 * embedding,
            bytes_after=2 * embedding,
        )
    ]
    for layer in range(6):
        at = f"model.layers.{layer}"
        if layer == 4:
            rows += [
                projection(f"{at}.{name}", out, into, "dropped", kept_params=0, reason=reason)
                for name, out, into in (("self_attn.q_proj", 576, 576), ("mlp.up_proj", 1536, 576))
                for reason in [f"decoder layer {layer} is dropped"]
            ]
            continue
        why = "no common divisor of 576 and 576 from 2 to 2 (at least 256 input channels per group)"
        rows.append(projection(f"{at}.self_attn.q_proj", 576, 576, "kept", reason=why))
        rows.append(
            projection(f"{at}.self_attn.k_proj", 192, 576, "unmatched", reason="no rule matches")
        )
        half, error = 1536 * 576 // 2, 0.2 + layer / 40
        block = {"kept_params": half, "init_error": error, **io_block}
        rows.append(projection(f"{at}.mlp.up_proj", 1536, 576, "replaced", **block))
        for expert in range(3):
            if (layer, expert) != (2, 1):
                rank = {"kept_params": 96 * 2112, "init_error": 0.125, **low_rank}
                name = f"{at}.mlp.experts.{expert}.down_proj"
                rows.append(projection(name, 576, 1536, "replaced", **rank))
    rows.append(Row("lm_head", "head", "tied", "shares its parameters with model.embed_tokens"))
    problems = ("replace[1]: [red]odd[/red] | layers \x1b[2J are left alone.",)
    return Report(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "mlp-half",
        tuple(rows),
        problems,
        FITTED_TO,
        given="../SmolLM2 (135M)",
        options={"calibration": ["[b]a.txt[/b]", "self"], "own_text": False, "seed": 3},
    )


def as_text(report: Report, width: int, *, encoding: str = "utf-8", **options: bool) -> str:
    """Return the text view as a terminal of that width without colour shows it."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    Console(file=out, width=width, color_system=None).print(TextView(report, **options))
    out.flush()
    text = out.buffer.getvalue().decode(encoding)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


@pytest.mark.parametrize(
    ("file", "make"),
    [
        ("report-80.txt", lambda report: as_text(report, 80)),
        ("report-120.txt", lambda report: as_text(report, 120)),
        ("report-full-120.txt", lambda report: as_text(report, 120, full=True)),
        ("report-ascii-80.txt", lambda report: as_text(report, 80, encoding="ascii", bars=True)),
        ("report.md", lambda report: render(report, "md")),
        ("report.csv", lambda report: render(report, "csv")),
        ("report.json", lambda report: render(report, "json")),
        ("card.md", lambda report: model_card(report, recipe_text="name: mlp-half\nreplace: []\n")),
    ],
)
def test_golden(file, make, update_golden):
    path = GOLDEN / file
    text = make(sample())
    if update_golden:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("full", [False, True])
def test_text_loses_nothing_at_any_width(width, full):
    report = sample()
    text = as_text(report, width, full=full)
    assert max(map(len, text.splitlines())) <= width
    squeezed = re.sub(r"\s+", "", text)
    lines = unfolded(report.rows) if full else fold(report.rows)
    for line in lines:
        # A name wider than its column is cut by the numbers beside it; the golden files show it.
        assert line.name in squeezed or len(line.name) > width // 2
    for words in (*ACTIONS, "grouped_pointwiseioG=4", "low_rankr=96", "1536x576", "problems"):
        assert words in squeezed
    assert f"{report.totals.params_after:,}" in text
    assert "[red]odd[/red]" in text  # markup in words from outside stays words


@pytest.mark.parametrize("name", FORMATS)
def test_no_view_passes_escape_sequences_on(name):
    text = render(sample(), name)
    assert "\x1b" not in text
    assert text == render(sample(), name)


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"csv"}))  # which is for programs
@pytest.mark.parametrize("full", [False, True])
def test_no_word_of_a_report_steers_the_terminal(name, full):
    odd = "\x1b[2J"
    row = projection(f"up{odd}", 4, 4, "kept", reason=odd, init_error=0.5)
    block = dataclasses.replace(row, action="replaced", structure=odd, options={odd: odd})
    report = Report(f"m{odd}", f"r{odd}", (row, block), (odd,), odd, odd, {"init": odd})
    assert "\x1b" not in render(report, name, full=full)


def test_text_says_it_in_colour_too():
    out = io.StringIO()
    Console(file=out, width=120, force_terminal=True, color_system="standard").print(
        TextView(sample())
    )
    coloured = {"replaced": "32", "kept": "2", "unmatched": "33", "tied": "2;36", "dropped": "31"}
    for action, code in coloured.items():
        assert f"\x1b[{code}m{action}" in out.getvalue()


def expand(name: str) -> list[str]:
    """Write out a folded name, as bash would with {0-2,5} read as 0 1 2 5."""
    parts = re.split(r"\{([^}]*)\}", name)
    choices = []
    for index, part in enumerate(parts):
        if index % 2 == 0:
            choices.append([part])
            continue
        numbers: list[str] = []
        for span in part.split(","):
            first, _, last = span.partition("-")
            numbers += map(str, range(int(first), int(last or first) + 1))
        choices.append(numbers)
    return ["".join(pick) for pick in itertools.product(*choices)]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.booleans()), unique=True))
def test_a_fold_stands_for_its_rows_and_no_others(places):
    rows = [
        Row(f"m.{a}.x.{b}.w", "projection", "kept" if kept else "unmatched", params_before=a)
        for a, b, kept in places
    ]
    lines = fold(rows)
    for line in lines:
        assert sorted(expand(line.name)) == sorted(row.name for row in line.rows)
        assert len({(row.action, row.params_before) for row in line.rows}) == 1
    assert sorted(id(row) for line in lines for row in line.rows) == sorted(map(id, rows))


def test_rows_that_fill_a_grid_are_one_line():
    rows = [Row(f"m.{a}.x.{b}.w", "projection", "kept") for a in range(3) for b in (0, 1, 7)]
    assert [line.name for line in fold(rows)] == ["m.{0-2}.x.{0-1,7}.w"]


def test_rows_of_which_something_else_is_left_are_no_one_line():
    rows = [Row(f"m.{n}.w", "projection", "replaced", params_after=n % 2) for n in range(4)]
    assert [line.name for line in fold(rows)] == ["m.{0,2}.w", "m.{1,3}.w"]


def test_lines_add_up_to_the_totals():
    report = sample()
    for lines in (fold(report.rows), unfolded(report.rows)):
        assert sum(line.params_before for line in lines) == report.totals.params_before
        assert sum(line.params_after for line in lines) == report.totals.params_after


def test_csv_holds_every_field_of_every_row():
    def value(field: str, cell: str) -> object:
        if field == "options":
            return json.loads(cell)
        if field == "init_error":
            return float(cell) if cell else None
        if field in ("in_features", "out_features"):
            return int(cell) if cell else None
        if field == "structure":
            return cell or None
        return int(cell) if "_" in field else cell

    report = sample()
    read = [
        Row(**{field: value(field, cell) for field, cell in row.items()})
        for row in csv.DictReader(io.StringIO(render(report, "csv")))
    ]
    assert tuple(read) == report.rows
    assert Report("", "", tuple(read)).totals == report.totals


def test_json_reads_back_and_keeps_its_shape():
    report = sample()
    data = json.loads(render(report, "json"))
    assert Report.from_dict(data) == report
    newer = ("fitted_to", "given", "options")
    older = {key: value for key, value in data.items() if key not in newer}
    older["rows"] = [{k: v for k, v in row.items() if k != "role"} for row in data["rows"]]
    assert Report.from_dict(older) == Report(report.model, "mlp-half", report.rows, report.problems)
    assert list(data) == ["format", "model", "recipe", "totals", "rows", *newer, "problems"]
    counts = ["params", "bytes", "flops_per_token"]
    pairs = [f"{count}_{when}" for count in counts for when in ("before", "after")]
    inner = ["non_embedding_before", "non_embedding_after"]
    assert sorted(data["totals"]) == sorted(pairs + inner)
    words = [
        "name",
        "kind",
        "action",
        "reason",
        "structure",
        "options",
        "in_features",
        "out_features",
    ]
    for row in data["rows"]:
        assert sorted(row) == sorted([*words, *pairs, "init_error", "role"])
    embedding = 49152 * 576
    assert data["totals"]["params_before"] - data["totals"]["non_embedding_before"] == embedding


@pytest.mark.parametrize("full", [False, True])
def test_markdown_tables_are_whole_and_add_up(full):
    report = sample()
    tables = re.findall(r"(?:^\|.*\|\n?)+", render(report, "md", full=full), re.MULTILINE)
    totals, rows = ([re.split(r"(?<!\\)\|", line)[1:-1] for line in t.splitlines()] for t in tables)
    assert {len(row) for row in totals} == {4}
    assert {len(row) for row in rows} == {9}
    body = [[cell.strip() for cell in row] for row in rows[2:]]
    assert sum(int(row[1]) for row in body) == len(report.rows)
    for column, total in ((5, report.totals.params_before), (6, report.totals.params_after)):
        assert sum(int(row[column].replace(",", "")) for row in body) == total


def test_svg_is_a_picture_of_the_text():
    svg = render(sample(), "svg")
    words = "".join(ET.fromstring(svg).itertext()).replace("\xa0", " ")
    assert "model.layers.{0-3,5}.mlp.up_proj" in words
    assert f"{sample().totals.params_after:,}" in words
    assert "<script" not in svg


def test_bars_are_as_long_as_the_layers_are_large():
    report = sample()
    layers = layer_params(report)
    assert [index for _, index in layers] == list(range(6))
    numbered = [row for row in report.rows if ".layers." in row.name]
    assert sum(before for before, _ in layers.values()) == sum(r.params_before for r in numbered)
    assert sum(after for _, after in layers.values()) == sum(r.params_after for r in numbered)
    text = as_text(report, 120, bars=True)
    bars = [re.search("(█*)(░*)$", line).groups() for line in text.splitlines() if "░" in line]
    widest = max(before for before, _ in layers.values())
    for (left, gone), (before, after) in zip(bars, layers.values(), strict=True):
        assert len(left) == pytest.approx(60 * after / widest, abs=0.51)
        assert len(left + gone) == pytest.approx(60 * before / widest, abs=0.51)


def test_a_widened_layer_has_the_longest_bar():
    rows = (
        projection("layers.0.fc", 10, 10, "kept"),
        projection("layers.1.fc", 10, 10, "kept", kept_params=200),
    )
    text = as_text(Report("m", "r", rows), 80, bars=True)
    assert [line.count("█") for line in text.splitlines() if "█" in line] == [29, 58]
    assert "200.0 %" in text


def test_stacks_beside_each_other_are_reported_apart():
    rows = tuple(projection(f"{stack}.0.fc", 4, 4, "kept") for stack in ("encoder", "decoder"))
    assert set(layer_params(Report("m", "r", rows))) == {("encoder", 0), ("decoder", 0)}


def test_an_empty_report_has_views_too():
    for name in FORMATS:
        assert render(Report("m", "r", ()), name, full=True)
    assert Report("m", "r", ()).totals.kept_ratio == 1


def test_unknown_format_is_named():
    with pytest.raises(ValueError, match=r"'pdf'; .* text, json, md, csv, svg, html$"):
        render(sample(), "pdf")


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_card_of_a_hub_model():
    origin = Origin("who/dense", "who/older", {"license": "mit"}, ("en", "fr"))
    card = model_card(sample(), recipe_text="name: mlp-half\n", origin=origin, datasets=["a/b"])
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "language": ["en", "fr"],
        "base_model": "who/dense",
        "base_model_relation": "finetune",
        "datasets": ["a/b"],
        "tags": ["llmslim"],
    }
    assert "# who/dense, slimmed with mlp-half" in card
    assert "import llmslim\n" in card
    assert "trust_remote_code=True" in card
    assert "healed" in card
    assert "```yaml\nname: mlp-half\n```" in card


def test_card_of_a_local_model_keeps_the_path_to_itself(tmp_path):
    report = dataclasses.replace(sample(), model=str(tmp_path / "my-model"))
    card = model_card(report)
    assert "base_model" not in front_matter(card)
    assert "# my-model, slimmed with mlp-half" in card
    assert str(tmp_path) not in card
    named = model_card(report, base_model="who/dense")
    assert front_matter(named)["base_model"] == "who/dense"
    assert "# who/dense, slimmed with mlp-half" in named


def test_card_of_a_model_made_from_one_on_the_hub():
    report = dataclasses.replace(sample(), model="mine")
    card = model_card(report, origin=Origin("", "who/dense"))
    assert front_matter(card)["base_model"] == "who/dense"
    assert "# mine, slimmed with mlp-half" in card
    assert "# who/mine, " in model_card(report, origin=Origin("", "who/mine"))


def test_card_of_a_plain_model_needs_no_custom_code():
    rows = (projection("layers.0.fc", 4, 4, "kept"), projection("layers.1.fc", 4, 4, "dropped"))
    card = model_card(Report("m", "phi3-2layer", rows))
    assert "trust_remote_code" not in card
    assert "import llmslim" not in card


def test_card_of_a_model_that_was_slim_already():
    card = model_card(Report("m", "kphi3", (projection("layers.0.fc", 4, 4, "kept"),)), slim=True)
    assert "import llmslim" in card
    assert "healed" not in card  # nothing was taken from it


def test_card_fences_a_recipe_that_has_fences():
    card = model_card(sample(), recipe_text="# ```\nname: x\n")
    assert "````yaml\n# ```\nname: x\n````" in card


def test_read_report_from_folder_and_file(tmp_path):
    file = tmp_path / "llmslim_report.json"
    file.write_text(render(sample(), "json"), encoding="utf-8")
    assert read_report(tmp_path).report == read_report(file).report == sample()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r": .*llmslim_report\.json"),
        ("{", r"llmslim_report\.json: .* JSON"),
        ("[" * 100_000, r"llmslim_report\.json: .* JSON"),
        ("[]", r"llmslim_report\.json: .* 'list'; .* 1\."),
        ('{"format": 2}', r"llmslim_report\.json: .* 2; .* 1\."),
        ('{"format": 1}', r"llmslim_report\.json: .*\bmodel\b"),
    ],
)
def test_read_report_refuses(tmp_path, text, message):
    if text is not None:
        (tmp_path / "llmslim_report.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        read_report(tmp_path)


def test_read_report_of_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="gone: "):
        read_report(tmp_path / "gone")


def test_totals_that_are_not_the_sums_of_the_rows_are_refused():
    data = sample().to_dict()
    assert Report.from_dict(data) == sample()
    data["totals"]["params_after"] -= 1
    with pytest.raises(CheckpointError):
        Report.from_dict(data)
