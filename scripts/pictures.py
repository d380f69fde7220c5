"""Draw the pictures of docs/how-it-works.md: python scripts/pictures.py [SLIM], into docs/pictures.

Each is a card with a background of its own, light or dark as the reader's system is, so that it can
be read on any page. Given a checkpoint, the upper part of its report's page becomes report.png;
that takes Debian's package chromium.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

OUT = Path(__file__).parents[1] / "docs" / "pictures"
STYLE = """
.card { fill: #ffffff } .line { stroke: #8a93a0 } .empty { fill: #e9ecf0 } .box { fill: #f3f5f8 }
text { fill: #1f2530; font: 13px system-ui, sans-serif } .small { font-size: 11.5px }
.title { font-weight: 600 } .middle { text-anchor: middle }
.a { fill: #2f6fb3 } .b { fill: #d98324 } .both { fill: #7a4fa3 }
.gone { fill: none; stroke-dasharray: 3 3 }
.dot { fill: #10141a } .learn { stroke: #d98324 } .faint { opacity: .3 }
@media (prefers-color-scheme: dark) {
  .card { fill: #1c2128 } .empty { fill: #2d343d } .box { fill: #262d36 } text { fill: #dfe4ea }
  .a { fill: #5b9be0 } .b { fill: #eba04e } .both { fill: #b48ae0 }
  .dot { fill: #ffffff } .learn { stroke: #eba04e }
}
"""
CELL = 15
CHANNELS, GROUPS = 12, 4
"""Inputs and outputs of the grouped block that is drawn, and its groups."""
PAGE = 1200, 1800
"""Width and height of what is shown of the page of a report."""


def _rect(x: float, y: float, w: float, h: float, kind: str, more: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" class="{kind}" {more}/>'


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "line", more: str = "") -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}" {more}/>'


def _arrow(x1: float, y1: float, x2: float, y2: float, kind: str = "line") -> str:
    return _line(x1, y1, x2, y2, kind, 'stroke-width="1.6" marker-end="url(#tip)"')


def cells(x: float, y: float, rows: int, kind: Callable[[int, int], str]) -> Iterable[str]:
    """Draw a grid of CHANNELS columns; `kind` gives the class of a row and a column."""
    for row in range(rows):
        for column in range(CHANNELS):
            place = x + CELL * column, y + CELL * row
            yield _rect(*place, CELL - 2, CELL - 2, kind(row, column), 'rx="2"')


def _write(name: str, width: int, height: int, title: str, parts: Iterable[str]) -> None:
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
        'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="#8a93a0"/></marker>'
    )
    inner = "\n".join([_rect(0, 0, width, height, "card", 'rx="8"'), *parts])
    (OUT / f"{name}.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n<defs>{tip}</defs>\n{inner}\n</svg>\n",
        encoding="utf-8",
    )


def grouped_block() -> None:
    """A dense matrix, and what of it the two branches of a grouped block have."""
    size = CHANNELS // GROUPS

    def neighbours(row: int, column: int) -> bool:
        return column // size == row // size

    def scattered(row: int, column: int) -> bool:
        return column % GROUPS == row // size

    kinds: list[tuple[str, str, Callable[[int, int], str]]] = [
        ("dense", "144 weights", lambda _r, _c: "both"),
        ("neighbours", "4 groups of 9 = 36", lambda r, c: "a" if neighbours(r, c) else "empty"),
        (
            "every fourth",
            "4 groups of 9 = 36",
            lambda r, c: "b" if scattered(r, c) else "empty",
        ),
    ]
    parts = []
    for n, (title, count, kind) in enumerate(kinds):
        x = 30 + 232 * n
        parts += [_text(x, 30, title, "title"), *cells(x, 44, CHANNELS, kind)]
        parts.append(_text(x, 44 + CELL * CHANNELS + 18, count, "small"))
    parts.append(_text(465, 140, "+", "title middle"))
    parts.append(_text(236, 140, "→", "title middle"))
    parts.append(
        _text(30, 278, "Rows are outputs, columns are inputs. Coloured: a weight.", "small")
    )
    _write(
        "grouped-block", 710, 294, "A dense matrix and the two branches of a grouped block", parts
    )


def learned_order() -> None:
    """Which inputs each group reads: by their numbers, or those that it needs."""
    needed = [{0, 3, 4, 7, 9, 11}, {1, 2, 4, 6, 9, 10}, {0, 2, 5, 6, 8, 9}, {1, 4, 5, 7, 9, 11}]
    size = CHANNELS // GROUPS
    fixed = [{*range(size * g, size * (g + 1)), *range(g, CHANNELS, GROUPS)} for g in range(GROUPS)]
    parts = []
    for x, title, chosen in ((92, "fixed order", fixed), (430, "learned order", needed)):
        parts.append(_text(x, 30, title, "title"))
        parts += cells(x, 44, GROUPS, lambda g, c, of=chosen: "b" if c in of[g] else "empty")
        for g in range(GROUPS):
            parts.append(_text(x - 66, 55 + CELL * g, f"outputs {g + 1}", "small"))
            for channel in needed[g]:
                place = x + CELL * channel + 6.5, 44 + CELL * g + 6.5
                parts.append(f'<circle cx="{place[0]:g}" cy="{place[1]:g}" r="2.6" class="dot"/>')
            met = len(needed[g] & chosen[g])
            parts.append(_text(x + CELL * CHANNELS + 6, 55 + CELL * g, f"{met} of 6", "small"))
    parts.append(
        _text(
            26,
            128,
            "Columns are inputs. Coloured: the group reads it. Dot: it matters most.",
            "small",
        )
    )
    _write("learned-order", 690, 144, "The inputs that each group of outputs reads", parts)


def width() -> None:
    """An MLP before and after half of its neurons are gone."""
    parts = []
    stays = {0, 3, 4, 6}
    for x, title in ((30, "8 neurons"), (270, "4 are dropped"), (510, "the rest is refitted")):
        parts.append(_text(x, 30, title, "title"))
        first = x == 30
        for neuron in range(8):
            if not first and neuron not in stays:
                if x == 270:
                    place = x + 75, 56 + 19 * neuron
                    parts.append(
                        f'<circle cx="{place[0]}" cy="{place[1]}" r="7" class="line gone"/>'
                    )
                continue
            y = 56 + 19 * neuron
            for end in range(4):
                other = 70 + 34 * end
                parts.append(_line(x + 8, other, x + 68, y, "line faint"))
                kind = "learn" if x == 510 else "line faint"
                parts.append(_line(x + 82, y, x + 142, other, kind, 'stroke-width="1.4"'))
            parts.append(f'<circle cx="{x + 75}" cy="{y}" r="7" class="a"/>')
        for end in range(4):
            ends = (x + 8, x + 142)
            parts += [f'<circle cx="{at}" cy="{70 + 34 * end}" r="5" class="both"/>' for at in ends]
    parts.append(
        _text(
            30,
            232,
            "Left inputs, right outputs. What is left stays an ordinary dense layer.",
            "small",
        )
    )
    _write("width", 690, 248, "An MLP that loses half of its neurons", parts)


def end_to_end() -> None:
    """Fits layer by layer, and then all layers together."""
    parts = []
    for y, title in ((20, "first: layer by layer"), (216, "then: all layers together")):
        alone = y == 20
        parts.append(_text(26, y + 14, title, "title"))
        for row, (name, kind) in enumerate((("dense", "both"), ("slim", "b"))):
            top = y + 34 + 72 * row
            parts.append(_text(26, top + 22, name))
            for n in range(4):
                x = 100 + 120 * n
                parts.append(_rect(x, top, 84, 34, "box line", 'rx="6"'))
                parts.append(_rect(x + 8, top + 12, 68 if row == 0 else 34, 10, kind, 'rx="3"'))
                parts.append(_arrow(x - 34, top + 17, x - 2, top + 17))
            parts.append(_arrow(546, top + 17, 576, top + 17))
            parts.append(_text(582, top + 22, "predictions", "small"))
        if alone:
            for n in range(4):
                x = 142 + 120 * n
                parts.append(_line(x, y + 70, x, y + 104, "learn", 'stroke-width="2"'))
                parts.append(_text(x + 7, y + 91, "compare", "small"))
        else:
            parts.append(_line(614, y + 66, 614, y + 110, "learn", 'stroke-width="2"'))
            parts.append(_text(621, y + 91, "compare", "small"))
            parts.append(_line(142, y + 154, 614, y + 154, "learn", 'stroke-width="2"'))
            for n in range(4):
                x = 142 + 120 * n
                parts.append(_line(x, y + 154, x, y + 142, "learn", 'stroke-width="2"'))
            parts.append(_line(614, y + 154, 614, y + 134, "learn", 'stroke-width="2"'))
            parts.append(_text(142, y + 172, "every layer learns from the difference", "small"))
    _write("end-to-end", 690, 404, "Fits layer by layer, then training all layers together", parts)


def report_page(slim: str) -> None:
    """Photograph the page of a checkpoint's report, in light colours."""
    # Chromium refuses to run as root in its sandbox, as in most containers.
    options = ["--headless", "--hide-scrollbars", *(["--no-sandbox"] if os.getuid() == 0 else [])]
    options += [f"--window-size={PAGE[0]},{PAGE[1]}", f"--screenshot={OUT / 'report.png'}"]
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        subprocess.run(["llmslim", "report", slim, "--format", "html", "-o", page], check=True)
        subprocess.run(["chromium", *options, page.as_uri()], check=True, capture_output=True)


def main() -> None:
    """Draw all of them."""
    OUT.mkdir(exist_ok=True)
    for draw in (grouped_block, learned_order, width, end_to_end):
        draw()


if __name__ == "__main__":
    main()
    for given in sys.argv[1:2]:
        report_page(given)
