"""Files of figures in benchmarks/results: which is the newest of a kind, and tables of them."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

Line = dict[str, Any]  # a result as JSON: numbers, texts, None


@dataclass(frozen=True)
class Figures:
    """One file: what `record.write` keeps."""

    path: Path
    machine: dict[str, str]
    options: Line
    lines: list[Line]

    def source(self) -> str:
        """One sentence: where, when, with what, and the file."""
        machine = self.machine
        where = machine.get("gpu") or f"{machine['threads']} threads of {machine['processor']}"
        versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "onnxruntime"))
        link = f"[figures](../benchmarks/results/{self.path.name})"
        load = f"load when it began {machine['load'].split()[0]}"  # above the threads: not alone
        return f"{where}, {machine['date'][:10]}, {versions}; {load}; {link}."


def newest(folder: Path, kind: str) -> Figures | None:
    """The file <kind>-<device>-<date>.json of the last date, or None."""
    named = re.compile(rf"{re.escape(kind)}-(?:cpu|cuda)-(\d{{4}}-\d\d-\d\d)\.json")
    found = [(match[1], path) for path in folder.iterdir() if (match := named.fullmatch(path.name))]
    if not found:
        return None
    path = max(found)[1]
    content = json.loads(path.read_text())
    return Figures(path, content["machine"], content["options"], content["results"])


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None is an empty cell, floats have two digits."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def missing(script: str) -> str:
    """What stands where there are no figures."""
    return f"Not measured: `python benchmarks/{script}` has left no file in benchmarks/results."
