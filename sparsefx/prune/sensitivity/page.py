"""The report on sensitivity as one HTML page; every text from the model is escaped."""

from collections.abc import Mapping, Sequence
from importlib.resources import files

from sparsefx import report_words as words
from sparsefx.prune.sensitivity.curves import charts
from sparsefx.prune.sensitivity.layers import Scan, Trial
from sparsefx.prune.sensitivity.text import headings, left_out, rise, standing_out
from sparsefx.report_page import Columns, Page, dotted, number, table, text, word

_CAPTION = (
    "Of each choice: ||(W - W')X|| / ||W X|| on dense inputs; percentages are unstructured. Knee: "
    "sparsity beyond which the error rises most sharply. Fragility: mean over the levels."
)
_METRIC = (
    " Signed: by how much the metric is worse than dense. Bears: the last sparsity with at most "
    "1 % more."
)


def render(title: str, whole: Scan, layers: Sequence[Scan], facts: Mapping[str, str]) -> str:
    """The whole page: tiles, curves and a table, all there without scripts."""
    style = files("sparsefx.prune.sensitivity").joinpath("page.css").read_text(encoding="utf-8")
    page = Page(
        title,
        facts,
        _tiles(whole, layers),
        _notes(whole, layers) + charts(whole, layers),
        heading="Every layer",
        hint="Filter by name",
        tables=_table(whole, layers),
        choices={},
        style=style,
    )
    return page.html()


def _tiles(whole: Scan, layers: Sequence[Scan]) -> list[tuple[str, str]]:
    amount = f"{words.amount(whole.weights)} weights, each choice by {whole.criterion}"
    tiles = [(words.counted(len(layers), "layer"), amount)] if layers else []
    if whole.bears is not None:
        more = f"dense: {words.figure(whole.dense)}"
        tiles.append((words.share(whole.bears), f"all layers bear with 1 % on the metric; {more}"))
    if whole.error_knee is not None:
        tiles.append((words.share(whole.error_knee), "knee of the layers' mean output error"))
    return tiles


def _notes(whole: Scan, layers: Sequence[Scan]) -> str:
    lines = [*standing_out(whole, layers), *left_out(layers)]
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f'<section class="card wide notes"><h2>What stands out</h2><ul>{items}</ul></section>'


def _table(whole: Scan, layers: Sequence[Scan]) -> str:
    if not layers:
        return ""
    with_metric = whole.dense is not None
    labels = [text(label) for label in headings(whole)]
    measures = [*labels, "knee", *((f"{label} metric" for label in labels) if with_metric else ())]
    extra = ["bears"] if with_metric else []
    columns: Columns = (
        ("#", True),
        ("layer", False),
        ("criterion", False),
        *((label, True) for label in (*measures, *extra, "fragility")),
    )
    rows = [_row(at, scan, labels) for at, scan in enumerate([whole, *layers])]
    caption = _CAPTION + (_METRIC if with_metric else "")
    return f'<div class="box">{table(columns, rows, caption)}</div>'


def _row(at: int, scan: Scan, labels: Sequence[str]) -> str:
    trials = list(zip(labels, scan.trials, strict=True))
    cells = [number(label, trial.error, words.figure(trial.error)) for label, trial in trials]
    cells.append(number("knee", scan.error_knee, words.share(scan.error_knee)))
    if scan.dense is not None:
        cells += [_rise(scan, label, trial) for label, trial in trials]
        cells.append(number("bears", scan.bears, words.share(scan.bears)))
    cells.append(number("fragility", scan.fragility, words.figure(scan.fragility)))
    head = f'{number("#", at, str(at or ""), "order")}<th scope="row">{dotted(scan.label)}</th>'
    return f'<tr data-fate="">{head}{word("criterion", scan.criterion)}{"".join(cells)}</tr>'


def _rise(scan: Scan, label: str, trial: Trial) -> str:
    return number(f"{label} metric", scan.rise_of(trial), rise(scan, trial))
