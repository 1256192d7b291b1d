"""The report on a pruning as one self-contained HTML page; every text from the model is escaped."""

from collections.abc import Mapping, Sequence
from importlib.resources import files

from sparsefx import report_words as words
from sparsefx.prune.report.charts import charts
from sparsefx.prune.report.layers import PrunedLayer, PruneTotals, total
from sparsefx.prune.report.text import standing_out
from sparsefx.report_page import Columns, Page, dotted, number, table, text, word

_COLUMNS: Columns = (
    ("#", True),
    ("layer", False),
    ("shape", False),
    ("pattern", False),
    ("criterion", False),
    ("asked", True),
    ("reached", True),
    ("error", True),
    ("decided s", True),
    ("bytes", True),
    ("stored", True),
)
_CAPTION = "Error: ||(W - W')X|| / ||W X|| on the calibration data; stored: bytes now, of dense"
_TIMES: Columns = (("dense us", True), ("sparse us", True), ("gain", True))
_OF_TIMES = "; dense us and sparse us: predicted by the roofline; gain: dense / sparse"
_STEPS = 200  # of a share, in the heat map that the page carries: half a percent


def render(title: str, layers: Sequence[PrunedLayer], facts: Mapping[str, str]) -> str:
    """The whole page: charts and a table, both there without scripts; a heat map with them."""
    folder = files("sparsefx.prune.report")
    page = Page(
        title,
        facts,
        _tiles(total(layers)),
        _stands_out(layers) + charts(layers),
        heading="Every layer",
        hint="Filter by name, pattern, criterion",
        tables=_table(layers),
        choices={"": "all", "missed": "missed sparsity"} if _any_missed(layers) else {},
        style=folder.joinpath("page.css").read_text(encoding="utf-8"),
        script=folder.joinpath("page.js").read_text(encoding="utf-8"),
    )
    return page.html()


def _tiles(totals: PruneTotals) -> list[tuple[str, str]]:
    zeros = f"{words.amount(totals.zeros)} of {words.amount(totals.weights)} weights"
    asked = f"zeros: {zeros} in {words.counted(totals.layers, 'layer')}; "
    tiles = [(words.share(totals.reached), f"{asked}{words.share(totals.asked)} asked")]
    if totals.mean_error is not None and totals.worst is not None:
        largest = f"mean output error of a layer; {words.figure(totals.worst.error)} the largest"
        tiles.append((words.figure(totals.mean_error), largest))
    if totals.dense_bytes:
        before, now = words.size(totals.dense_bytes), words.size(totals.stored_bytes)
        share = words.percent(totals.stored_bytes, totals.dense_bytes)
        tiles.append((share, f"of their bytes: {now} of {before}"))
    if totals.gain is not None:
        before, now = words.duration(totals.dense_us), words.duration(totals.sparse_us)
        missing = totals.layers - totals.predicted
        without = f"; {missing} without a prediction" if missing else ""
        tiles.append((words.times(totals.gain), f"predicted: {before} dense, {now} now{without}"))
    tiles.append((words.duration(1e6 * totals.seconds), "to decide which weights stay"))
    return tiles


def _any_missed(layers: Sequence[PrunedLayer]) -> bool:
    return any(layer.missed for layer in layers)


def _stands_out(layers: Sequence[PrunedLayer]) -> str:
    lines = "".join(f"<li>{text(line)}</li>" for line in standing_out(layers))
    if not lines:
        return ""
    return f'<section class="card wide notes"><h2>What stands out</h2><ul>{lines}</ul></section>'


def _table(layers: Sequence[PrunedLayer]) -> str:
    timed = any(layer.dense_us is not None for layer in layers)
    rows = [_row(at, layer, timed) for at, layer in enumerate(layers)]
    columns = _COLUMNS + _TIMES if timed else _COLUMNS
    caption = _CAPTION + _OF_TIMES * timed + "."
    return f'<div class="box">{table(columns, rows, caption)}</div>' if rows else ""


def _row(at: int, layer: PrunedLayer, timed: bool) -> str:
    shape = f"{layer.shape[0]}x{layer.shape[1]}"
    now, share = layer.stored_bytes, words.percent(layer.stored_bytes, layer.dense_bytes)
    cells = [
        number("#", at + 1, str(at + 1), "order"),
        f'<th scope="row">{dotted(layer.label)}</th>',
        word("shape", shape),
        word("pattern", layer.pattern, "shape"),
        word("criterion", layer.criterion),
        number("asked", layer.asked, words.share(layer.asked)),
        number("reached", layer.reached, words.share(layer.reached)),
        number("error", layer.error, words.figure(layer.error)),
        number("decided s", layer.seconds, words.figure(layer.seconds)),
        number("bytes", layer.dense_bytes, words.size(layer.dense_bytes)),
        number("stored", now, share),
    ]
    if timed:
        cells += [
            number("dense us", layer.dense_us, words.microseconds(layer.dense_us)),
            number("sparse us", layer.sparse_us, words.microseconds(layer.sparse_us)),
            number("gain", layer.gain, words.times(layer.gain)),
        ]
    fate = "missed" if layer.missed else ""
    about = f'data-fate="{fate}" data-at="{at}" data-shape="{shape}" data-heat="{_heat(layer)}"'
    return f"<tr {about}>{''.join(cells)}</tr>"


def _heat(layer: PrunedLayer) -> str:
    """Two hexadecimal digits a cell, in half percents; rows are parted by blanks."""
    # A share that is none (`violations` names it; max drops a NaN) leaves the other cells readable.
    return " ".join(
        bytes(round(_STEPS * min(max(0.0, share), 1.0)) for share in row).hex()
        for row in layer.heat
    )
