"""The report on sensitivity as plain text: layers x choices, the most fragile first."""

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from sparsefx import report_words as words
from sparsefx.prune.sensitivity.layers import Scan, Trial, most_fragile
from sparsefx.report_text import NARROWEST, WIDEST, fold, printed, wrap

_NAMED = 5  # layers that a line about many names
_NARROW_NAME = 24
_LEGEND = (
    "of each choice: ||(W - W')X|| / ||W X|| on dense inputs; percentages are unstructured; knee: "
    "sparsity beyond which the error rises most sharply"
)
_METRIC = (
    "below it: by how much the metric is worse than dense; bears: the last sparsity with at most "
    "1 % more; of all layers: mean error, and the metric with all of them pruned at once"
)


def render(
    title: str, whole: Scan, layers: Sequence[Scan], facts: Mapping[str, str], width: int
) -> str:
    """The whole report; `width` in columns is brought into NARROWEST..WIDEST."""
    width = min(max(width, NARROWEST), WIDEST)
    head = [words.printable(title)]
    head += [words.printable(f"  {label}: {fact}") for label, fact in facts.items()]
    legend = [_LEGEND] if whole.dense is None else [f"{_LEGEND}; {_METRIC}"]
    table = [_table([whole, *most_fragile(layers)], width), *wrap(legend, width), ""]
    foot = [*standing_out(whole, layers), *left_out(layers)]
    return "\n".join([*wrap(head, width), "", *(table if layers else []), *wrap(foot, width)])


def standing_out(whole: Scan, layers: Sequence[Scan]) -> list[str]:
    """Lines on the model's knee, and on the layers that bear least."""
    if not layers:
        return ["no layer was tried"]
    lines = []
    if whole.bears is not None:
        bends = f"; the metric bends up most at {words.share(whole.metric_knee)}"
        lines.append(f"all layers together bear {words.share(whole.bears)}{bends}")
    if whole.error_knee is not None:
        lines.append(f"knee of the mean error: {words.share(whole.error_knee)}")
    if len(layers) > 1:
        lines.append(f"most fragile: {', '.join(_fragile(whole, layers)[:_NAMED])}")
    return lines


def _fragile(whole: Scan, layers: Sequence[Scan]) -> list[str]:
    """What was pruned alone, a weight or for a metric perhaps a block, by falling fragility."""
    names = [scan.label if whole.dense is None else scan.group for scan in most_fragile(layers)]
    return [words.printable(name.removesuffix(".weight")) for name in dict.fromkeys(names)]


def left_out(layers: Sequence[Scan]) -> list[str]:
    """One line for each choice and reason for which it was not tried."""
    found: dict[tuple[str, str], list[str]] = {}
    for scan in layers:
        for trial in scan.trials:
            if trial.reason:
                found.setdefault((trial.pattern, trial.reason), []).append(scan.label)
    lines = []
    for (pattern, reason), names in found.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        named = ", ".join(words.printable(name) for name in names[:_NAMED])
        lines.append(f"{pattern} left out of {named}{more}: {reason}")
    return lines


def headings(whole: Scan) -> list[str]:
    """What the choices are called: "2:4", and "50%" for what is unstructured."""
    return [trial.pattern.removeprefix("unstructured ") for trial in whole.trials]


def rise(scan: Scan, trial: Trial) -> str:
    """By how much the metric is worse than dense, signed: "+3.1%", "+inf%"; "" if not asked."""
    value = scan.rise_of(trial)
    return "" if value is None else f"{100 * value:+.3g}%"


def _table(scans: Sequence[Scan], width: int) -> str:
    with_metric = scans[0].dense is not None
    labels = [*headings(scans[0]), "knee", *(["bears"] if with_metric else [])]
    cells = [_cells(scan, with_metric) for scan in scans]
    others = sum(
        max(len(part) for row in [labels, *cells] for part in row[at].splitlines() or [""]) + 2
        for at in range(len(labels))
    )
    space = max(width - others, _NARROW_NAME)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    longest = max(len(scan.label) for scan in scans)
    table.add_column("layer", overflow="fold", min_width=min(space, longest))
    for label in labels:
        table.add_column(label, justify="right", overflow="fold")
    for scan, row in zip(scans, cells, strict=True):
        name = fold(words.printable(scan.label), space)
        table.add_row(Text(name), *(Text(cell) for cell in row))
    return printed(table, width)


def _cells(scan: Scan, with_metric: bool) -> list[str]:
    choices = ["-" if trial.reason else _cell(scan, trial) for trial in scan.trials]
    bears = [words.share(scan.bears)] if with_metric else []
    return [*choices, words.share(scan.error_knee), *bears]


def _cell(scan: Scan, trial: Trial) -> str:
    error, worse = words.figure(trial.error), rise(scan, trial)
    return f"{error}\n{worse}" if worse else error
