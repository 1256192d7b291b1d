"""The report on a pruning as plain text: a table, what stands out, totals."""

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from sparsefx import report_words as words
from sparsefx.prune.report.layers import PrunedLayer, PruneTotals, total
from sparsefx.report_text import NARROWEST, ROOMY, WIDEST, fold, printed, wrap

_NAMED = 5  # layers that a line about many names
# Columns of text and the narrowest form of each; the others are numbers, which are never folded.
_FLOORS = {"layer": 24, "shape": 9, "pattern": 12, "criterion": 10}
_NARROW = 116  # columns below which pattern and criterion share one
_WORDY = 20
_LEGEND = (
    "error: ||(W - W')X|| / ||W X|| on the calibration data; s: seconds that the decision took; "
    "stored: bytes, of dense; dense, sparse: predicted microseconds; gain = dense / sparse"
)


def render(title: str, layers: Sequence[PrunedLayer], facts: Mapping[str, str], width: int) -> str:
    """The whole report; `width` in columns is brought into NARROWEST..WIDEST."""
    width = min(max(width, NARROWEST), WIDEST)
    head = [words.printable(title)]
    head += [words.printable(f"  {label}: {fact}") for label, fact in facts.items()]
    table = [_table(layers, width), *wrap([_LEGEND], width), ""] if layers else []
    foot = [*standing_out(layers), *summary(total(layers))]
    return "\n".join([*wrap(head, width), "", *table, *wrap(foot, width)])


def standing_out(layers: Sequence[PrunedLayer]) -> list[str]:
    """Lines on the layers worth a look: the largest error, sparsity missed by over a point."""
    totals = total(layers)
    lines = []
    if totals.worst is not None and totals.mean_error is not None and len(layers) > 1:
        largest = f"{words.figure(totals.worst.error)} in {words.printable(totals.worst.label)}"
        mean = totals.mean_error
        ratio = f", {words.times((totals.worst.error or 0) / mean)} the mean" if mean else ""
        lines.append(f"largest output error: {largest}{ratio}")
    missed = [layer for layer in layers if layer.missed]
    # The farthest from what was asked first: no more than a few are named.
    missed.sort(key=lambda layer: -abs(layer.reached - layer.asked))
    if missed:
        named = "; ".join(
            f"{words.printable(layer.label)} ({words.share(layer.reached)} of "
            f"{words.share(layer.asked)})"
            for layer in missed[:_NAMED]
        )
        more = f"; {len(missed) - _NAMED} more" if len(missed) > _NAMED else ""
        count = words.counted(len(missed), "layer")
        lines.append(f"sparsity missed by more than one point in {count}: {named}{more}")
    return lines + _notes(layers)


def _notes(layers: Sequence[PrunedLayer]) -> list[str]:
    """How many layers have each note, most first."""
    counts = Counter(layer.note for layer in layers if layer.note)
    return [
        f"{words.counted(count, 'layer')}: {words.printable(note)}"
        for note, count in counts.most_common()
    ]


def summary(totals: PruneTotals) -> list[str]:
    """The totals, each a line."""
    zeros = f"{words.amount(totals.zeros)} of {words.amount(totals.weights)} weights are zero"
    lines = [words.counted(totals.layers, "layer") + " pruned"]
    if totals.weights:
        sparsity = f"{words.share(totals.reached)}, {words.share(totals.asked)} asked"
        lines[0] += f": {zeros} ({sparsity}), decided in {words.duration(1e6 * totals.seconds)}"
    if totals.mean_error is not None:
        lines.append(f"mean output error: {words.figure(totals.mean_error)}")
    if totals.dense_bytes:
        before, now = words.size(totals.dense_bytes), words.size(totals.stored_bytes)
        share = words.percent(totals.stored_bytes, totals.dense_bytes)
        lines.append(f"their bytes: {before} dense -> {now} now ({share})")
    if totals.predicted:
        before, now = words.duration(totals.dense_us), words.duration(totals.sparse_us)
        missing = totals.layers - totals.predicted
        without = f"; {missing} without a prediction" if missing else ""
        gain = f" ({words.times(totals.gain)})" if totals.gain is not None else ""
        lines.append(f"their predicted time: {before} dense -> {now} sparse{gain}{without}")
    return lines


def _table(layers: Sequence[PrunedLayer], width: int) -> str:
    cells = [_cells(layer, width) for layer in layers]
    # A column that says nothing of any layer leaves its room to the others.
    labels = [label for label in cells[0] if any(row[label] for row in cells)]
    padding = 2 if width >= ROOMY else 1
    others = sum(_width(label, cells) + padding for label in labels if label != "layer")
    space = max(width - others - padding, _FLOORS["layer"])
    longest = max(len(row["layer"]) for row in cells)
    table = Table(box=None, padding=(0, padding, 0, 0), header_style="")
    for label in labels:
        if label in _FLOORS:
            floor = min(space, longest) if label == "layer" else _FLOORS[label]
            table.add_column(label, overflow="fold", min_width=floor)
        else:
            table.add_column(label, justify="right", no_wrap=True)
    for row in cells:
        name = fold(row["layer"], space)
        table.add_row(*(Text(name if label == "layer" else row[label]) for label in labels))
    return printed(table, width)


def _width(label: str, cells: Sequence[Mapping[str, str]]) -> int:
    """Columns that `label` needs; text beyond _WORDY is folded, so that names have room."""
    needed = max(len(line) for row in cells for line in [label, *row[label].splitlines()])
    return max(min(needed, _WORDY), _FLOORS[label]) if label in _FLOORS else needed


def _cells(layer: PrunedLayer, width: int) -> dict[str, str]:
    """A narrow table has no room for all columns: the criterion joins the pattern there."""
    pattern, criterion = words.printable(layer.pattern), words.printable(layer.criterion)
    narrow = width < _NARROW
    return {
        "layer": words.printable(layer.label),
        "shape": f"{layer.shape[0]}x{layer.shape[1]}" if width >= ROOMY else "",
        "pattern": f"{pattern}\n{criterion}" if narrow else pattern,
        "criterion": "" if narrow else criterion,
        "asked": words.share(layer.asked),
        "reached": words.share(layer.reached),
        "error": words.figure(layer.error),
        "s": words.figure(layer.seconds),
        "stored": words.percent(layer.stored_bytes, layer.dense_bytes),
        "dense": words.microseconds(layer.dense_us),
        "sparse": words.microseconds(layer.sparse_us),
        "gain": words.times(layer.gain),
    }
