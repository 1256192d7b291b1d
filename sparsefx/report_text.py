"""The report as plain text: tables as wide as the terminal, then reasons and totals."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsefx import report_words as words
from sparsefx.report_rows import Row, Totals, stored_bytes, total

NARROWEST, WIDEST = 100, 160
ROOMY = 144  # columns from which each fact has a column of its own

_REST = 74  # columns that the other cells of a narrow table take
_ATTENTION_REST, _ROOMY_ATTENTION_REST = 77, 126  # and those of a table of attentions
# Columns whose cells are never folded, and the narrowest form of the others.
_NUMBERS = frozenset(
    {"graph", "skipped", "lost", "error", "from", "dense", "sparse", "gain", "stored"}
)
_FLOORS = {
    "node": 20, "op": 6, "shape": 8, "pattern": 12, "runs": 14, "node, shape": 20,
    "pattern, runs": 14,
}  # fmt: skip
_LEGEND = "times in microseconds; gain = dense / sparse, ~ where modelled"
_ATTENTION_LEGEND = (
    f"{_LEGEND}; skipped: share of tiles or elements that the calibration data skipped; lost: "
    "largest mean softmax mass that a head lost there; from: fewest keys that run the kernel"
)


@dataclass(frozen=True)
class _Frame:
    """What all cells depend on: numbers of the reasons, several graphs, columns of the terminal."""

    numbers: Mapping[str, int]
    graphs: bool
    width: int

    @property
    def roomy(self) -> bool:
        return self.width >= ROOMY


def render(title: str, rows: Sequence[Row], facts: Mapping[str, str], width: int) -> str:
    """The whole report; `width` in columns is brought into NARROWEST..WIDEST.

    Reasons repeat over many nodes, so that the tables refer to them by number. Attentions that have
    thresholds are in a table of their own.
    """
    width = min(max(width, NARROWEST), WIDEST)
    totals = total(rows)
    head = [words.printable(title)]
    head += [words.printable(f"  {label}: {fact}") for label, fact in facts.items()]
    numbers = {reason: at for at, (reason, _) in enumerate(totals.reasons, start=1)}
    frame = _Frame(numbers, len({row.graph for row in rows}) > 1, width)
    return "\n".join([*wrap(head, width), "", *_tables(rows, frame), *wrap(summary(totals), width)])


def _tables(rows: Sequence[Row], frame: _Frame) -> list[str]:
    attentions = [row for row in rows if row.thresholds]
    others = [row for row in rows if not row.thresholds]
    parts: list[str] = []
    if others:
        parts += [_table([_cells(row, frame) for row in others], frame), _LEGEND, ""]
    if attentions:
        parts += [_table([_attention_cells(row, frame) for row in attentions], frame)]
        parts += [*wrap([_ATTENTION_LEGEND, *_thresholds(attentions)], frame.width), ""]
    return parts


def wrap(lines: Sequence[str], width: int) -> list[str]:
    """`lines` folded to `width` columns; what follows a fold is indented."""
    wrapper = textwrap.TextWrapper(width, subsequent_indent="      ", break_on_hyphens=False)
    return [part for line in lines for part in wrapper.wrap(line)]


def summary(totals: Totals) -> list[str]:
    """The reasons with their numbers, and the totals, each a line."""
    kernels = ", ".join(f"{words.printable(name)} {count}" for name, count in totals.kernels)
    lowered = f"{totals.lowered} sparse" + (f" ({kernels})" if kernels else "")
    lines = [f"{totals.candidates} candidates: {lowered}, {totals.declined} dense"]
    for at, (reason, count) in enumerate(totals.reasons, start=1):
        lines.append(f"  [{at}] {count} x {words.printable(reason) or 'no reason given'}")
    if totals.speedup is not None:
        before, now = words.duration(totals.dense_us), words.duration(totals.chosen_us)
        gain = f"{before} dense -> {now} now ({words.times(totals.speedup)})"
        lines.append(f"time of the candidates: {gain}; {words.source(totals)}")
    if totals.dense_bytes:
        before, now = words.size(totals.dense_bytes), words.size(totals.stored_bytes)
        share = words.percent(totals.stored_bytes, totals.dense_bytes)
        lines.append(f"their weights: {before} dense -> {now} now ({share})")
        if totals.kept_bytes != totals.stored_bytes:
            lines[-1] += f", {words.size(totals.kept_bytes)} in memory, dense ones included"
    if totals.error is not None:
        lines.append(f"largest error of a chosen kernel: {words.error(totals.error)}")
    return lines


def _table(cells: Sequence[Mapping[str, str]], frame: _Frame) -> str:
    table = Table(box=None, padding=(0, 2 if frame.roomy else 1, 0, 0), header_style="")
    for label in cells[0]:
        if label in _NUMBERS:
            table.add_column(label, justify="right", no_wrap=True)
        elif label == "node":  # folded already: the other texts give way
            table.add_column(label, no_wrap=True)
        else:
            table.add_column(label, overflow="fold", min_width=_FLOORS[label])
    for row in cells:
        table.add_row(*(Text(cell) for cell in row.values()))
    return printed(table, frame.width)


def _cells(row: Row, frame: _Frame) -> dict[str, str]:
    roomy = frame.roomy
    cells = {
        "graph": str(row.graph) if frame.graphs else None,
        "node": fold(words.printable(row.name), frame.width - _REST),
        "op": words.printable(row.op) if roomy else None,
        "shape": words.printable(row.shape),
        "pattern": words.printable(row.pattern),
        "runs": _runs(row, frame),
        **_times(row),
        "error": words.error(row.error) if roomy else None,
        "stored": words.percent(stored_bytes(row), row.dense_bytes) if roomy else None,
    }
    return {label: text for label, text in cells.items() if text is not None}


def _attention_cells(row: Row, frame: _Frame) -> dict[str, str]:
    """A narrow table has no room for four columns of text: there, two facts share a cell."""
    rest = _ROOMY_ATTENTION_REST if frame.roomy else _ATTENTION_REST
    node = fold(words.printable(row.name), frame.width - rest)
    shape, pattern = words.printable(row.shape), words.printable(row.pattern)
    runs = _runs(row, frame)
    texts = {"node": node, "shape": shape, "pattern": pattern, "runs": runs}
    if not frame.roomy:
        texts = {"node, shape": f"{node}\n  {shape}", "pattern, runs": f"{pattern}\n{runs}"}
    return {
        **({"graph": str(row.graph)} if frame.graphs else {}),
        **texts,
        "skipped": words.share(row.skipped),
        "lost": words.error(row.lost_mass),
        "error": words.error(row.error),
        "from": "" if row.crossover is None else str(row.crossover),
        **_times(row),
    }


def _runs(row: Row, frame: _Frame) -> str:
    if row.kernel:
        runs = row.by_rows or row.kernel
        runs = words.printable(f"{runs} with {row.merged}" if row.merged else runs)
        runs += f" [{frame.numbers[row.reason]}]" if row.reason else ""
    else:
        runs = f"dense [{frame.numbers[row.reason]}]"
    return "; ".join(filter(None, (runs, words.quantised(row))))


def _times(row: Row) -> dict[str, str]:
    about = "~" if row.how == "modelled" and row.speedup is not None else ""
    return {
        "dense": words.microseconds(row.dense_us),
        "sparse": words.microseconds(row.sparse_us),
        "gain": about + words.times(row.speedup),
    }


def _thresholds(rows: Sequence[Row]) -> list[str]:
    """Each attention's thresholds, once: it has a row in every graph."""
    lines = [words.printable(f"  {row.name}: {row.thresholds}") for row in rows]
    return ["thresholds:", *dict.fromkeys(lines)]


def fold(name: str, space: int) -> str:
    """`name`, on two lines where it is longer than `space`, so that its last part stays whole."""
    parent, dot, leaf = name.rpartition(".")
    return f"{parent}{dot}\n  {leaf}" if dot and len(name) > space else name


def printed(table: Table, width: int) -> str:
    """A table as plain lines of at most `width` columns, without trailing blanks."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
