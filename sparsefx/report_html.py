"""The report as one self-contained HTML page; every text from the model is escaped."""

from collections.abc import Mapping, Sequence

from sparsefx import report_charts
from sparsefx import report_words as words
from sparsefx.report_page import Columns, Page, dotted, number, table, text, word
from sparsefx.report_rows import Row, Totals, stored_bytes, total

_FIRST: Columns = (("#", True), ("node", False))
_FATE = ("kernel, or why dense", False)
_TIMES: Columns = (("dense us", True), ("sparse us", True), ("gain", True), ("how", False))
_COLUMNS: Columns = (
    *_FIRST,
    ("op", False),
    ("shape", False),
    ("pattern", False),
    _FATE,
    *_TIMES,
    ("error", True),
    ("bytes", True),
    ("stored", True),
)
_ATTENTION_COLUMNS: Columns = (
    *_FIRST,
    ("shape", False),
    ("pattern", False),
    _FATE,
    ("skipped", True),
    ("lost mass", True),
    ("error", True),
    ("from keys", True),
    *_TIMES,
    ("thresholds", False),
)
_ATTENTION_CAPTION = (
    "Attention with thresholds. Skipped: share of tiles or elements that the calibration data "
    "skipped; lost mass: largest mean softmax mass that a head lost there; from keys: fewest keys "
    "that run the kernel."
)


def render(title: str, rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """The whole page. Attentions that have thresholds are in a table of their own."""
    page = Page(
        title,
        facts,
        _tiles(total(rows)),
        _charts(rows),
        heading="Every candidate",
        hint="Filter by name, pattern, reason",
        tables=_tables(rows),
        choices={"": "all", "sparse": "sparse", "dense": "dense"},
    )
    return page.html()


def _tables(rows: Sequence[Row]) -> str:
    graphs = len({row.graph for row in rows}) > 1
    drawn = [
        (bool(row.thresholds), (_attention_row if row.thresholds else _row)(at, row, graphs))
        for at, row in enumerate(rows, start=1)
    ]
    others = [row for is_attention, row in drawn if not is_attention]
    attentions = [row for is_attention, row in drawn if is_attention]
    return (table(_ATTENTION_COLUMNS, attentions, _ATTENTION_CAPTION) if attentions else "") + (
        table(_COLUMNS, others) if others else ""
    )


def _tiles(totals: Totals) -> list[tuple[str, str]]:
    kernels = ", ".join(f"{name} {count}" for name, count in totals.kernels)
    tiles = [(f"{totals.lowered} of {totals.candidates}", f"nodes run sparse. {kernels}")]
    if totals.speedup is not None:
        before, now = words.duration(totals.dense_us), words.duration(totals.chosen_us)
        note = f"candidates: {before} dense, {now} now. {words.source(totals)}"
        tiles.append((words.times(totals.speedup), note))
    if totals.dense_bytes:
        before, now = words.size(totals.dense_bytes), words.size(totals.stored_bytes)
        share = words.percent(totals.stored_bytes, totals.dense_bytes)
        tiles.append((share, f"of the weight bytes: {now} of {before}"))
    if totals.error is not None:
        note = "largest error of a chosen kernel, relative to the largest dense value"
        tiles.append((words.error(totals.error), note))
    return tiles


def _charts(rows: Sequence[Row]) -> str:
    reasons = "".join(
        f"<li><b>{count}</b><span>{text(reason) or 'no reason given'}</span></li>"
        for reason, count in total(rows).reasons
    )
    declined = (
        f'<ul class="reasons">{reasons}</ul>'
        if reasons
        else "<p>None: every node runs its own kernel.</p>"
    )
    why = f'<section class="card"><h2>Reasons</h2>{declined}</section>'
    pair = f'<div class="pair">{report_charts.weights(rows)}{why}</div>'
    return report_charts.speedups(rows) + pair


def _row(at: int, row: Row, graphs: bool) -> str:
    cells = (
        *_first(at, row, graphs),
        word("op", row.op),
        word("shape", row.shape, "shape"),
        word("pattern", row.pattern),
        _fate(row),
        *_times(row),
        number("error", row.error, words.error(row.error)),
        number("bytes", row.dense_bytes, words.size(row.dense_bytes) if row.dense_bytes else ""),
        number("stored", stored_bytes(row), words.percent(stored_bytes(row), row.dense_bytes)),
    )
    return _line(row, cells)


def _attention_row(at: int, row: Row, graphs: bool) -> str:
    crossover = "" if row.crossover is None else str(row.crossover)
    cells = (
        *_first(at, row, graphs),
        word("shape", row.shape, "shape"),
        word("pattern", row.pattern, "shape"),
        _fate(row),
        number("skipped", row.skipped, words.share(row.skipped)),
        number("lost mass", row.lost_mass, words.error(row.lost_mass)),
        number("error", row.error, words.error(row.error)),
        number("from keys", row.crossover, crossover),
        *_times(row),
        word("thresholds", row.thresholds, "why limits"),
    )
    return _line(row, cells)


def _line(row: Row, cells: Sequence[str]) -> str:
    return f'<tr data-fate="{"sparse" if row.kernel else "dense"}">{"".join(cells)}</tr>'


def _first(at: int, row: Row, graphs: bool) -> tuple[str, str]:
    name = f"{row.name} (graph {row.graph})" if graphs else row.name
    node = f'<th scope="row">{dotted(name)}</th>'
    return number("#", at, str(at), "order"), node


def _fate(row: Row) -> str:
    style = "sparse" if row.kernel else "dense"
    merged = f"one call with {row.merged}" if row.merged else ""
    why = "; ".join(filter(None, (row.reason or merged, words.quantised(row))))
    return (
        f'<td class="fate"><span class="badge {style}">{text(row.kernel) or "dense"}</span> '
        f'<span class="why">{text(why)}</span></td>'
    )


def _times(row: Row) -> tuple[str, str, str, str]:
    return (
        number("dense us", row.dense_us, words.microseconds(row.dense_us)),
        number("sparse us", row.sparse_us, words.microseconds(row.sparse_us)),
        number("gain", row.speedup, words.times(row.speedup)),
        word("how", row.how),
    )
