"""A report as one HTML file that needs no network.

What is shown is worked out here and written by the templates beside this file, with everything
that comes from outside escaped. Colours, tables and charts are plain HTML, CSS and SVG; a short
script sorts and toggles, and without it everything can still be read.
"""

from __future__ import annotations

import tempfile
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmslim.errors import and_more, printable
from llmslim.report import healed, wording
from llmslim.report.lines import fold, unfolded
from llmslim.report.measures import measures
from llmslim.report.page.charts import Axis, Plot, Point, line, thinned
from llmslim.report.page.heat import heat_maps
from llmslim.report.read import ReportFile
from llmslim.report.report import Report
from llmslim.report.speeds import explanation, headline, speed_rows

_MOST_ROWS = 1_500
"""Of the table: beyond that the file would become large, and nobody would read it."""
_NAMES = 3
"""Of the modules that share a reason."""


def as_html(report: Report, *, full: bool = False) -> str:
    """Return the page of a report by itself; with `full`, the table begins with every module."""
    return report_page(ReportFile(report, {}), full=full)


def report_page(found: ReportFile, *, full: bool = False) -> str:
    """Return the page of a report and of all that is known beside it.

    Args:
        found: what to show.
        full: whether the table begins with every module in place of folded ones.

    Raises:
        CheckpointError: if a file of the folder cannot be read.
    """
    report = found.report
    folded, every = fold(report.rows), unfolded(report.rows)
    known = measures(found)
    return render_page(
        "report.html.j2",
        title=found.name,
        found=found,
        report=report,
        sizes=[one for one in known if one.kind == "size"],
        quality=[one for one in known if one.kind == "quality"],
        maps=heat_maps(report),
        folded=folded[:_MOST_ROWS],
        every=every if len(folded) < len(every) <= _MOST_ROWS else [],
        left_out=max(0, len(folded) - _MOST_ROWS),
        full=full,
        untouched=_untouched(report),
        facts=[
            (name, value)
            for name, value in (healed.facts(found.healing) if found.healing else ())
            if not name.startswith("held-out loss")  # these are with the quality
        ],
        losses=_losses(found),
        benchmarks=[
            (headline(one), speed_rows(one), (*one.notes, explanation(one)))
            for one in found.benchmarks
        ],
        commands=found.commands(),
        provenance=_provenance(found),
    )


def open_page(page: str) -> Path:
    """Show a page in the browser; return the temporary file with it, which stays."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", prefix="llmslim-", suffix=".html", delete=False
    ) as file:
        file.write(page)
    webbrowser.open(Path(file.name).as_uri())
    return Path(file.name)


def render_page(template: str, **values: Any) -> str:
    """Return a template of this package, filled in."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def clean(value: Any) -> Any:
        """Take control characters from what comes from outside; leave what is HTML already."""
        outside = isinstance(value, str) and not isinstance(value, Markup)
        return printable(value, lines=True) if outside else value

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(words=wording, **values)
    return "".join(f"{line}\n" for line in page.splitlines() if line.strip())


def _untouched(report: Report) -> list[dict[str, Any]]:
    """Return why modules were left as they are: a reason, their number, names and parameters."""
    reasons: dict[str, list[Any]] = {}
    for one in fold(row for row in report.rows if row.action in ("kept", "unmatched", "tied")):
        reasons.setdefault(one.first.reason or one.first.action, []).append(one)
    found = [
        {
            "reason": reason,
            "modules": sum(len(one.rows) for one in lines),
            "names": and_more([one.name for one in lines], _NAMES),
            "params": sum(one.params_before for one in lines),
        }
        for reason, lines in reasons.items()
    ]
    return sorted(found, key=lambda one: -int(one["params"]))


def _losses(found: ReportFile) -> list[Plot]:
    """Return the losses of a healing over its steps: one plot where all are of one kind."""
    done = found.healing or {}
    trained, held_out = healed.curves(found.history, done.get("loss_before"))
    dense = done.get("loss_teacher")
    level = [] if dense is None else [("dense model, held out", float(dense))]
    if done.get("objective") == healed.CROSS_ENTROPY:
        plots = [_plot("loss, nats", trained, held_out, level)]
    else:  # the training's loss is another quantity, of another size
        plots = [
            _plot("loss on held-out text, nats", [], held_out, level),
            _plot(f"loss of the training: {done.get('objective')}", trained, [], []),
        ]
    return [plot for plot in plots if plot is not None]


def _plot(
    name: str,
    trained: Sequence[Point],
    held_out: Sequence[Point],
    levels: Sequence[tuple[str, float]],
) -> Plot | None:
    """Return a plot of losses over steps; None where there are less than two."""
    points = [*trained, *held_out]
    if len(points) < 2:
        return None
    x = Axis.over([0.0, *(step for step, _ in points)], "step", margin=0.02)
    y = Axis.over([*(loss for _, loss in points), *(loss for _, loss in levels)], name)
    lines = [line("training", thinned(trained), x, y)] if trained else []
    if held_out:
        lines.append(line("held out", held_out, x, y, dots=True))
    return Plot(x, y, tuple(lines), tuple((name, y.at(loss)) for name, loss in levels))


def _provenance(found: ReportFile) -> dict[str, Any]:
    """Return versions, and the files of both models with their hashes."""
    manifest, scores = found.manifest, found.scores
    source = manifest.get("source")
    source = source if isinstance(source, Mapping) else {}
    versions = {"llmslim": manifest.get("llmslim"), **(scores.versions if scores else {})}
    lists = {
        "of the model it was made from": source.get("files"),
        "of this checkpoint": manifest.get("files"),
    }
    return {
        "source": source.get("model") or found.report.model,
        "versions": {name: version for name, version in versions.items() if version},
        "files": {what: _files(files) for what, files in lists.items() if _files(files)},
    }


def _files(listed: Any) -> Sequence[tuple[str, str, str]]:
    """Return name, size and hash of each file that a manifest lists."""
    return [
        (name, wording.size(int(one["bytes"])), str(one["sha256"]))
        for name, one in (listed.items() if isinstance(listed, Mapping) else ())
        if isinstance(one, Mapping) and {"bytes", "sha256"} <= one.keys()
    ]
