"""SensitivityReport: what each layer of one model can bear, as text, JSON and HTML."""

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_type_hints

from sparsefx import report_json
from sparsefx.errors import InvalidReport
from sparsefx.files import write_atomically
from sparsefx.prune.sensitivity import page, text
from sparsefx.prune.sensitivity.layers import Scan as Scan
from sparsefx.prune.sensitivity.layers import Trial as Trial
from sparsefx.prune.sensitivity.layers import most_fragile

_VERSION = 1  # of the JSON form
_TRIAL = get_type_hints(Trial)
_SCAN = get_type_hints(Scan) | {"trials": list}


@dataclass
class SensitivityReport:
    """The scans of one model.

    title: e.g. the model's class; whole: all layers together; layers: in model order; facts: label
    -> text. `str(report)` is a table as wide as the terminal, between 100 and 160 columns, the most
    fragile layers first.
    """

    title: str
    whole: Scan
    layers: list[Scan] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def most_fragile(self) -> list[Scan]:
        """The layers by falling fragility: mean rise of the metric, or mean error without one."""
        return most_fragile(self.layers)

    def check(self) -> list[str]:
        """What cannot be so in any scan (a negative error, a metric that is NaN); else []."""
        return [violation for scan in (self.whole, *self.layers) for violation in scan.violations()]

    def __str__(self) -> str:
        columns = shutil.get_terminal_size((120, 24)).columns
        return text.render(self.title, self.whole, self.layers, self.facts, columns)

    def to_json(self, path: str | Path) -> None:
        """Writes everything; the file appears whole or not at all. ValueError on NaN, OSError."""
        scans: list[object] = [asdict(scan) for scan in (self.whole, *self.layers)]
        contents = report_json.Contents(_VERSION, self.title, self.facts, scans)
        report_json.write(Path(path), "scans", contents, indent=1)

    def to_html(self, path: str | Path) -> None:
        """Writes one self-contained page (no other file, no network); it works without scripts."""
        html = page.render(self.title, self.whole, self.layers, self.facts)
        write_atomically(Path(path), html.encode())

    @classmethod
    def from_json(cls, path: str | Path) -> "SensitivityReport":
        """Reads what `to_json` wrote. Raises InvalidReport, OSError."""
        contents = report_json.read(Path(path), "scans", (_VERSION,))
        scans = [_scan(Path(path), entry) for entry in contents.entries]
        if not scans or scans[0].name:
            raise InvalidReport(path=path, rule="the first scan is not that of all layers")
        return cls(contents.title, scans[0], scans[1:], contents.facts)


def _scan(path: Path, entry: object) -> Scan:
    fields = report_json.entry_of(path, entry, _SCAN, _SCAN, "scan")
    trials = fields["trials"]
    assert isinstance(trials, list)
    # The values are of the types of their fields, which mypy cannot see.
    read = tuple(
        Trial(**report_json.entry_of(path, each, _TRIAL, _TRIAL, "trial"))  # type: ignore[arg-type]
        for each in trials
    )
    scan = Scan(**{**fields, "trials": read})  # type: ignore[arg-type]
    for violation in scan.violations():
        raise InvalidReport(path=path, rule=violation)
    return scan
