"""PruneReport: the layers of one pruned model, as text, JSON and HTML."""

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_type_hints

from sparsefx import report_json
from sparsefx.errors import InvalidReport
from sparsefx.files import write_atomically
from sparsefx.prune.report import page, text
from sparsefx.prune.report.layers import PrunedLayer as PrunedLayer
from sparsefx.prune.report.layers import PruneTotals as PruneTotals
from sparsefx.prune.report.layers import heat_of as heat_of
from sparsefx.prune.report.layers import total

_VERSION = 1  # of the JSON form
_LISTS = {"shape", "heat"}  # tuples, which are lists in JSON
_TYPES = {
    name: list if name in _LISTS else kind for name, kind in get_type_hints(PrunedLayer).items()
}


@dataclass
class PruneReport:
    """The pruned layers of one model, in model order, plus facts that hold for all of it.

    title: e.g. the model's class; facts: label -> text (target, calibration data, versions).
    `str(report)` is a table as wide as the terminal, between 100 and 160 columns.
    """

    title: str
    layers: list[PrunedLayer] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def totals(self) -> PruneTotals:
        """Sums over the layers as they are now."""
        return total(self.layers)

    def check(self) -> list[str]:
        """What cannot be so in any layer (a share above 1, a time that is NaN); else []."""
        return [violation for layer in self.layers for violation in layer.violations()]

    def __str__(self) -> str:
        columns = shutil.get_terminal_size((120, 24)).columns
        return text.render(self.title, self.layers, self.facts, columns)

    def to_json(self, path: str | Path) -> None:
        """Writes everything; the file appears whole or not at all. ValueError on NaN, OSError."""
        layers: list[object] = [asdict(layer) for layer in self.layers]
        contents = report_json.Contents(_VERSION, self.title, self.facts, layers)
        report_json.write(Path(path), "layers", contents, indent=None)  # a heat map is 1,024 lines

    def to_html(self, path: str | Path) -> None:
        """Writes one self-contained page (no other file, no network); it works without scripts."""
        html = page.render(self.title, self.layers, self.facts)
        write_atomically(Path(path), html.encode())

    @classmethod
    def from_json(cls, path: str | Path) -> "PruneReport":
        """Reads what `to_json` wrote. Raises InvalidReport, OSError."""
        contents = report_json.read(Path(path), "layers", (_VERSION,))
        layers = [_layer(Path(path), entry) for entry in contents.entries]
        return cls(contents.title, layers, contents.facts)


def _layer(path: Path, entry: object) -> PrunedLayer:
    fields = report_json.entry_of(path, entry, _TYPES, _TYPES, "layer")
    fields |= {"shape": _shape(path, fields["shape"]), "heat": _heat(path, fields["heat"])}
    # The values are of the types of their fields, which mypy cannot see.
    layer = PrunedLayer(**fields)  # type: ignore[arg-type]
    for violation in layer.violations():
        raise InvalidReport(path=path, rule=violation)
    return layer


def _shape(path: Path, shape: object) -> tuple[int, ...]:
    assert isinstance(shape, list)
    if len(shape) != 2 or not all(type(size) is int for size in shape):  # True is no size
        raise InvalidReport(path=path, rule="shape of a layer is not two whole numbers")
    return tuple(shape)


def _heat(path: Path, heat: object) -> tuple[tuple[float, ...], ...]:
    assert isinstance(heat, list)
    if not all(isinstance(row, list) for row in heat) or not all(
        type(share) in (int, float) for row in heat for share in row
    ):
        raise InvalidReport(path=path, rule="heat of a layer is not a list of lists of numbers")
    return tuple(tuple(row) for row in heat)
