"""The report as one self-contained HTML page; every text from the model is escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

from sparsefx import report_charts
from sparsefx import report_words as words
from sparsefx.report_rows import Row, Totals, stored_bytes, total

# Heading and whether the column holds numbers, which are right-aligned and sorted as numbers.
_COLUMNS = (
    ("#", True),
    ("node", False),
    ("op", False),
    ("shape", False),
    ("pattern", False),
    ("kernel, or why dense", False),
    ("dense us", True),
    ("sparse us", True),
    ("gain", True),
    ("how", False),
    ("error", True),
    ("bytes", True),
    ("stored", True),
)


def render(title: str, rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """The whole page."""
    template = Template(files("sparsefx").joinpath("report.html").read_text(encoding="utf-8"))
    graphs = len({row.graph for row in rows}) > 1
    return template.substitute(
        title=_text(title),
        facts="".join(
            f"<li>{_text(name)} <b>{_text(text)}</b></li>" for name, text in facts.items()
        ),
        tiles=_tiles(total(rows)),
        charts=_charts(rows),
        columns="".join(_head(label, numbers) for label, numbers in _COLUMNS),
        rows="\n".join(_row(at, row, graphs) for at, row in enumerate(rows, start=1)),
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


def _head(label: str, numbers: bool) -> str:
    return f'<th scope="col"{" class=n" if numbers else ""}>{label}</th>'


def _row(at: int, row: Row, graphs: bool) -> str:
    fate = "sparse" if row.kernel else "dense"
    name = f"{row.name} (graph {row.graph})" if graphs else row.name
    cells = (
        _number("#", at, str(at), "order"),
        f'<th scope="row">{_text(name).replace(".", ".<wbr>")}</th>',
        _word("op", row.op),
        _word("shape", row.shape, "shape"),
        _word("pattern", row.pattern),
        f'<td class="fate"><span class="badge {fate}">{_text(row.kernel) or "dense"}</span> '
        f'<span class="why">{_text(row.reason)}</span></td>',
        _number("dense us", row.dense_us, words.microseconds(row.dense_us)),
        _number("sparse us", row.sparse_us, words.microseconds(row.sparse_us)),
        _number("gain", row.speedup, words.times(row.speedup)),
        _word("how", row.how),
        _number("error", row.error, words.error(row.error)),
        _number("bytes", row.dense_bytes, words.size(row.dense_bytes) if row.dense_bytes else ""),
        _number("stored", stored_bytes(row), words.percent(stored_bytes(row), row.dense_bytes)),
    )
    return f'<tr data-fate="{fate}">{"".join(cells)}</tr>'


def _word(label: str, text: str, style: str = "") -> str:
    return f'<td{_classes(style, text)} data-label="{label}">{_text(text)}</td>'


def _number(label: str, value: float | None, text: str, style: str = "") -> str:
    sortable = "" if value is None else repr(value)
    classes = _classes(f"n {style}", text)
    return f'<td{classes} data-label="{label}" data-value="{sortable}">{text}</td>'


def _classes(style: str, text: str) -> str:
    names = style.split() + ([] if text else ["empty"])
    return f' class="{" ".join(names)}"' if names else ""
