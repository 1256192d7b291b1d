"""explain(): one row for every candidate node, as text, JSON and HTML."""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_type_hints

from sparsefx import report_html, report_text
from sparsefx.errors import InvalidReport
from sparsefx.files import write_atomically
from sparsefx.report_rows import Row as Row
from sparsefx.report_rows import Totals as Totals
from sparsefx.report_rows import total

_VERSION = 2  # of the JSON form
_SINCE_2 = {"skipped", "lost_mass", "crossover", "thresholds"}  # fields of a row


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
        rows = [asdict(row) for row in self.rows]
        data = {"version": _VERSION, "title": self.title, "facts": self.facts, "rows": rows}
        write_atomically(Path(path), json.dumps(data, indent=1, allow_nan=False).encode())

    def to_html(self, path: str | Path) -> None:
        """Writes one self-contained page (no other file, no network); it works without scripts."""
        page = report_html.render(self.title, self.rows, self.facts)
        write_atomically(Path(path), page.encode())

    @classmethod
    def from_json(cls, path: str | Path) -> "Report":
        """Reads what `to_json` wrote, now or at version 1. Raises InvalidReport, OSError."""
        try:
            data = json.loads(Path(path).read_bytes())
        except (ValueError, RecursionError) as error:
            raise InvalidReport(path=path, rule=f"it is not JSON: {error}") from error
        version = data.get("version") if isinstance(data, dict) else None
        if not isinstance(data, dict) or version not in (1, _VERSION):
            raise InvalidReport(path=path, rule=f"it is not a report of version 1 or {_VERSION}")
        title, facts, rows = data.get("title"), data.get("facts"), data.get("rows")
        if not isinstance(title, str) or not isinstance(facts, dict) or not isinstance(rows, list):
            raise InvalidReport(path=path, rule="title, facts or rows are missing")
        if not all(isinstance(text, str) for text in facts.values()):
            raise InvalidReport(path=path, rule="a fact is not text")
        known = set(_TYPES) - (_SINCE_2 if version == 1 else set())
        return cls(title, [_row(path, entry, known) for entry in rows], facts)


_TYPES = get_type_hints(Row)


def _row(path: str | Path, entry: object, known: set[str]) -> Row:
    if not isinstance(entry, dict) or set(entry) != known:
        names = ", ".join(name for name in _TYPES if name in known)
        raise InvalidReport(path=path, rule=f"a row does not have the fields {names}")
    for name, value in entry.items():
        kind = _TYPES[name]
        whole = kind == float | None and isinstance(value, int)  # 12 for 12.0
        if isinstance(value, bool) or not (whole or isinstance(value, kind)):
            raise InvalidReport(path=path, rule=f"{name} of a row is {value!r}")
    return Row(**entry)
