"""explain(): one row for every candidate node, as text, JSON and HTML."""

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_type_hints

from sparsefx import report_html, report_json, report_text
from sparsefx.files import write_atomically
from sparsefx.report_rows import Row as Row
from sparsefx.report_rows import Totals as Totals
from sparsefx.report_rows import total

_VERSION = 4  # of the JSON form
# version -> fields that a row has since then
_SINCE = {
    2: {"skipped", "lost_mass", "crossover", "thresholds"},
    3: {"by_rows", "kept_bytes", "merged"},
    4: {"quantised_us"},
}


@dataclass
class Report:
    """The rows of one compiled model, in graph order, plus facts that hold for all of it.

    title: e.g. the model's class; facts: label -> text (target, guard, versions, seconds).
    `str(report)` is a table as wide as the terminal, between 100 and 160 columns.
    """

    title: str
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def totals(self) -> Totals:
        """Sums over the rows as they are now."""
        return total(self.rows)

    def check(self) -> list[str]:
        """Violations of "every row has a kernel and two times, or a reason"; [] if it holds."""
        return [text for row in self.rows for text in row.violations()]

    def __str__(self) -> str:
        columns = shutil.get_terminal_size((120, 24)).columns
        return report_text.render(self.title, self.rows, self.facts, columns)

    def to_json(self, path: str | Path) -> None:
        """Writes everything; the file appears whole or not at all. ValueError on NaN, OSError."""
        rows: list[object] = [asdict(row) for row in self.rows]
        contents = report_json.Contents(_VERSION, self.title, self.facts, rows)
        report_json.write(Path(path), "rows", contents, indent=1)

    def to_html(self, path: str | Path) -> None:
        """Writes one self-contained page (no other file, no network); it works without scripts."""
        page = report_html.render(self.title, self.rows, self.facts)
        write_atomically(Path(path), page.encode())

    @classmethod
    def from_json(cls, path: str | Path) -> "Report":
        """Reads what `to_json` wrote, at any version. Raises InvalidReport, OSError."""
        contents = report_json.read(Path(path), "rows", range(1, _VERSION + 1))
        later = (names for version, names in _SINCE.items() if version > contents.version)
        known = set(_TYPES).difference(*later)
        rows = [
            # The values are of the types of their fields, which mypy cannot see.
            Row(**report_json.entry_of(Path(path), entry, _TYPES, known, "row"))  # type: ignore[arg-type]
            for entry in contents.entries
        ]
        return cls(contents.title, rows, contents.facts)


_TYPES = get_type_hints(Row)
