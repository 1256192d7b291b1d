"""The report as plain text: a table as wide as the terminal, then reasons and totals."""

import io
import textwrap
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsefx import report_words as words
from sparsefx.report_rows import Row, Totals, stored_bytes, total

NARROWEST, WIDEST = 100, 160
ROOMY = 144  # columns from which the table also shows the kind of node, the error and the bytes

_REST = 74  # columns that the other cells of a narrow table take
_NUMBERS = ("graph", "dense", "sparse", "gain", "error", "stored")  # never folded
_FLOORS = {"node": 20, "op": 6, "shape": 8, "pattern": 12, "runs": 14}  # narrowest columns
_LEGEND = "times in microseconds; gain = dense / sparse, ~ where modelled"


def render(title: str, rows: Sequence[Row], facts: Mapping[str, str], width: int) -> str:
    """The whole report; `width` in columns is brought into NARROWEST..WIDEST.

    Reasons repeat over many nodes, so that the table refers to them by number.
    """
    width = min(max(width, NARROWEST), WIDEST)
    totals = total(rows)
    head = [words.printable(title)]
    head += [words.printable(f"  {label}: {fact}") for label, fact in facts.items()]
    table = [_print(_table(rows, totals, width), width), _LEGEND, ""] if rows else []
    return "\n".join([*_wrap(head, width), "", *table, *_wrap(summary(totals), width)])


def _wrap(lines: Sequence[str], width: int) -> list[str]:
    wrap = textwrap.TextWrapper(width, subsequent_indent="      ", break_on_hyphens=False)
    return [part for line in lines for part in wrap.wrap(line)]


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
    if totals.error is not None:
        lines.append(f"largest error of a chosen kernel: {words.error(totals.error)}")
    return lines


def _table(rows: Sequence[Row], totals: Totals, width: int) -> Table:
    numbers = {reason: at for at, (reason, _) in enumerate(totals.reasons, start=1)}
    graphs = len({row.graph for row in rows}) > 1
    cells = [_cells(row, numbers, graphs, width) for row in rows]
    table = Table(box=None, padding=(0, 2 if width >= ROOMY else 1, 0, 0), header_style="")
    for label in cells[0]:
        if label in _NUMBERS:
            table.add_column(label, justify="right", no_wrap=True)
        else:
            table.add_column(label, overflow="fold", min_width=_FLOORS[label])
    for row in cells:
        table.add_row(*(Text(cell) for cell in row.values()))
    return table


def _cells(row: Row, numbers: Mapping[str, int], graphs: bool, width: int) -> dict[str, str]:
    roomy = width >= ROOMY
    about = "~" if row.how == "modelled" and row.speedup is not None else ""
    cells = {
        "graph": str(row.graph) if graphs else None,
        "node": _fold(words.printable(row.name), width - _REST),
        "op": words.printable(row.op) if roomy else None,
        "shape": words.printable(row.shape),
        "pattern": words.printable(row.pattern),
        "runs": words.printable(row.kernel) or f"dense [{numbers[row.reason]}]",
        "dense": words.microseconds(row.dense_us),
        "sparse": words.microseconds(row.sparse_us),
        "gain": about + words.times(row.speedup),
        "error": words.error(row.error) if roomy else None,
        "stored": words.percent(stored_bytes(row), row.dense_bytes) if roomy else None,
    }
    return {label: text for label, text in cells.items() if text is not None}


def _fold(name: str, space: int) -> str:
    """`name`, on two lines where it is longer than `space`, so that its last part stays whole."""
    parent, dot, leaf = name.rpartition(".")
    return f"{parent}{dot}\n  {leaf}" if dot and len(name) > space else name


def _print(table: Table, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
