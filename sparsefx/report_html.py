"""The report as one self-contained HTML page; every text from the model is escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

from sparsefx import report_charts
from sparsefx import report_words as words
from sparsefx.report_rows import Row, Totals, stored_bytes, total

# Heading and whether the column holds numbers, which are right-aligned and sorted as numbers.
_Columns = tuple[tuple[str, bool], ...]
_FIRST: _Columns = (("#", True), ("node", False))
_FATE = ("kernel, or why dense", False)
_TIMES: _Columns = (("dense us", True), ("sparse us", True), ("gain", True), ("how", False))
_COLUMNS: _Columns = (
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
_ATTENTION_COLUMNS: _Columns = (
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
    template = Template(files("sparsefx").joinpath("report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=_text(title),
        facts="".join(
            f"<li>{_text(name)} <b>{_text(text)}</b></li>" for name, text in facts.items()
        ),
        tiles=_tiles(total(rows)),
        charts=_charts(rows),
        tables=_tables(rows),
    )


def _tables(rows: Sequence[Row]) -> str:
    graphs = len({row.graph for row in rows}) > 1
    drawn = [
        (bool(row.thresholds), (_attention_row if row.thresholds else _row)(at, row, graphs))
        for at, row in enumerate(rows, start=1)
    ]
    others = "\n".join(row for is_attention, row in drawn if not is_attention)
    attentions = "\n".join(row for is_attention, row in drawn if is_attention)
    caption = f"<caption>{_ATTENTION_CAPTION}</caption>"
    return (_table(_ATTENTION_COLUMNS, attentions, caption) if attentions else "") + (
        _table(_COLUMNS, others) if others else ""
    )


def _table(columns: _Columns, rows: str, caption: str = "") -> str:
    head = "".join(
        f'<th scope="col"{" class=n" if numbers else ""}>{label}</th>' for label, numbers in columns
    )
    return (
        f'<table class="bare">{caption}\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody>\n</table>\n"
    )


def _text(text: str) -> str:
    return escape(words.printable(text))


def _tiles(totals: Totals) -> str:
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
    return "".join(
        f'<div class="card tile"><b>{_text(value)}</b><span>{_text(note)}</span></div>'
        for value, note in tiles
    )


def _charts(rows: Sequence[Row]) -> str:
    reasons = "".join(
        f"<li><b>{count}</b><span>{_text(reason) or 'no reason given'}</span></li>"
        for reason, count in total(rows).reasons
    )
    declined = f'<ul class="reasons">{reasons}</ul>' if reasons else "<p>None did.</p>"
    why = f'<section class="card"><h2>Why nodes stayed dense</h2>{declined}</section>'
    pair = f'<div class="pair">{report_charts.weights(rows)}{why}</div>'
    return report_charts.speedups(rows) + pair


def _row(at: int, row: Row, graphs: bool) -> str:
    cells = (
        *_first(at, row, graphs),
        _word("op", row.op),
        _word("shape", row.shape, "shape"),
        _word("pattern", row.pattern),
        _fate(row),
        *_times(row),
        _number("error", row.error, words.error(row.error)),
        _number("bytes", row.dense_bytes, words.size(row.dense_bytes) if row.dense_bytes else ""),
        _number("stored", stored_bytes(row), words.percent(stored_bytes(row), row.dense_bytes)),
    )
    return _line(row, cells)


def _attention_row(at: int, row: Row, graphs: bool) -> str:
    crossover = "" if row.crossover is None else str(row.crossover)
    cells = (
        *_first(at, row, graphs),
        _word("shape", row.shape, "shape"),
        _word("pattern", row.pattern, "shape"),
        _fate(row),
        _number("skipped", row.skipped, words.share(row.skipped)),
        _number("lost mass", row.lost_mass, words.error(row.lost_mass)),
        _number("error", row.error, words.error(row.error)),
        _number("from keys", row.crossover, crossover),
        *_times(row),
        _word("thresholds", row.thresholds, "why limits"),
    )
    return _line(row, cells)


def _line(row: Row, cells: Sequence[str]) -> str:
    return f'<tr data-fate="{"sparse" if row.kernel else "dense"}">{"".join(cells)}</tr>'


def _first(at: int, row: Row, graphs: bool) -> tuple[str, str]:
    name = f"{row.name} (graph {row.graph})" if graphs else row.name
    node = f'<th scope="row">{_text(name).replace(".", ".<wbr>")}</th>'
    return _number("#", at, str(at), "order"), node


def _fate(row: Row) -> str:
    style = "sparse" if row.kernel else "dense"
    return (
        f'<td class="fate"><span class="badge {style}">{_text(row.kernel) or "dense"}</span> '
        f'<span class="why">{_text(row.reason)}</span></td>'
    )


def _times(row: Row) -> tuple[str, str, str, str]:
    return (
        _number("dense us", row.dense_us, words.microseconds(row.dense_us)),
        _number("sparse us", row.sparse_us, words.microseconds(row.sparse_us)),
        _number("gain", row.speedup, words.times(row.speedup)),
        _word("how", row.how),
    )


def _word(label: str, text: str, style: str = "") -> str:
    return f'<td{_classes(style, text)} data-label="{label}">{_text(text)}</td>'


def _number(label: str, value: float | None, text: str, style: str = "") -> str:
    sortable = "" if value is None else repr(value)
    classes = _classes(f"n {style}", text)
    return f'<td{classes} data-label="{label}" data-value="{sortable}">{text}</td>'


def _classes(style: str, text: str) -> str:
    names = style.split() + ([] if text else ["empty"])
    return f' class="{" ".join(names)}"' if names else ""
