"""The report: one row for every module that owns parameters, and their totals.

A `Report` holds numbers. Text, Markdown, CSV and JSON are views of it (`llmslim.report`), which
count nothing themselves.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from llmslim.errors import CheckpointError

FORMAT = 1

_COUNTS = (
    *("params_before", "params_after", "bytes_before", "bytes_after"),
    *("flops_per_token_before", "flops_per_token_after"),
)

WIDTH = "width"
"""The structure of a whole MLP: fewer neurons, everything dense. No block, so no file of its own
in `modeling`; what comes out is an ordinary model."""

Action = Literal["replaced", "kept", "unmatched", "tied", "dropped"]
Kind = Literal["projection", "embedding", "head", "other"]


@dataclass(frozen=True)
class Row:
    """What becomes of one module of the source model."""

    name: str
    """Dotted name in the source model."""
    kind: Kind
    """`projection` (a dense map inside), `embedding`, `head` (output embedding), `other`."""
    action: Action
    """`replaced` by a block, `kept` by a rule or because it cannot be replaced, `unmatched` by any
    rule, `tied` to another row that counts the parameters, `dropped` with its layer."""
    reason: str = ""
    """Why; empty where the action explains itself."""
    structure: str | None = None
    """Name of the block's structure, for replaced rows."""
    options: dict[str, Any] = field(default_factory=dict)
    """The block's resolved options."""
    in_features: int | None = None
    """Input size before, for rows that are dense maps."""
    out_features: int | None = None
    """Output size before, for rows that are dense maps."""
    params_before: int = 0
    params_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    flops_per_token_before: int = 0
    """Two per weight of a dense map; lookups, norms and attention scores are not counted."""
    flops_per_token_after: int = 0
    init_error: float | None = None
    """Relative squared error of the fitted block against the dense map."""
    role: str = ""
    """The projection's role in its decoder layer, as recipes name it; empty for other modules."""

    @property
    def counts_as_embedding(self) -> bool:
        """Whether non-embedding totals leave the row out."""
        return self.kind in ("embedding", "head")


@dataclass(frozen=True)
class Totals:
    """Sums over the rows."""

    params_before: int
    params_after: int
    non_embedding_before: int
    """Without token and position embeddings and the output head."""
    non_embedding_after: int
    bytes_before: int
    bytes_after: int
    flops_per_token_before: int
    flops_per_token_after: int

    @classmethod
    def of(cls, rows: tuple[Row, ...]) -> Totals:
        """Add up rows."""
        inner = [row for row in rows if not row.counts_as_embedding]
        return cls(
            non_embedding_before=sum(row.params_before for row in inner),
            non_embedding_after=sum(row.params_after for row in inner),
            **{key: sum(getattr(row, key) for row in rows) for key in _COUNTS},
        )

    @property
    def kept_ratio(self) -> float:
        """Share of the non-embedding parameters that is left; 1.0 where there were none."""
        before = self.non_embedding_before
        return self.non_embedding_after / before if before else 1.0


@dataclass(frozen=True)
class Report:
    """What a recipe makes of a model, module by module.

    In a shell it shows as a headline, in a notebook as a table.
    """

    model: str
    """Name or path of the source model."""
    recipe: str
    """Name of the recipe."""
    rows: tuple[Row, ...]
    problems: tuple[str, ...] = ()
    """Notes that a reader must see, one sentence each."""
    fitted_to: str = ""
    """Description of the text that blocks were fitted to; empty where there was none."""
    given: str = ""
    """The source model as `convert` takes it, folders of an absolute path left out; empty where no
    conversion made this."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of that conversion which differ from their defaults, by name."""

    @property
    def totals(self) -> Totals:
        """Sums over the rows, computed each time, so that the two always agree."""
        return Totals.of(self.rows)

    def __repr__(self) -> str:
        from llmslim.report.page.brief import headline  # a view, which imports this module

        return headline(self)

    def _repr_html_(self) -> str:
        from llmslim.report.page.brief import table

        return table(self)

    def show(self) -> Path:
        """Open the report as a page in the browser; return the temporary file with it."""
        from llmslim.report.page.html import as_html, open_page

        return open_page(as_html(self))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; `format` changes when their layout does."""
        return {
            "format": FORMAT,
            "model": self.model,
            "recipe": self.recipe,
            "totals": asdict(self.totals),
            "rows": [asdict(row) for row in self.rows],
            "fitted_to": self.fitted_to,
            "given": self.given,
            "options": self.options,
            "problems": list(self.problems),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, where: str = "report") -> Report:
        """Read back what `to_dict` wrote.

        Args:
            data: JSON values.
            where: the file, for messages.

        Raises:
            CheckpointError: if it is not a report, or its totals are not the sums of its rows.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise CheckpointError(f"{where}: report format {found!r}; this version reads {FORMAT}.")
        known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        try:
            # Strict JSON has lists for tuples and objects for rows, and converts nothing else.
            report = TypeAdapter(cls).validate_json(json.dumps(known), strict=True)
        except (ValidationError, RecursionError) as error:
            why = str(error)
            if isinstance(error, ValidationError):
                wrong = error.errors(include_url=False)[0]
                why = f"{'.'.join(map(str, wrong['loc'])) or 'JSON'}: {wrong['msg']}"
            raise CheckpointError(
                f"{where}: not a llmslim report ({why}). Take the file as llmslim wrote it."
            ) from error
        if asdict(report.totals) != data.get("totals"):
            raise CheckpointError(f"{where}: its totals are not the sums of its rows.")
        return report
