"""Charts of a report as inline SVG: speed-up by node, bytes by kind of layer."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from sparsefx import report_words as words
from sparsefx.report_rows import Row, stored_bytes

KINDS = 12  # bars of the second chart; the smallest kinds beyond are summed
WIDTH, HEIGHT = 1000, 200  # of a plot, in its own units
_REACH = 6  # the axis ends at 2^-6 and 2^6 at most


def speedups(rows: Sequence[Row]) -> str:
    """A bar for each timed node in graph order, on a logarithmic axis around 1x; "" for none."""
    timed = [(row, row.speedup) for row in rows]
    bars = [(row, math.log2(gain)) for row, gain in timed if gain]
    if not bars:
        return ""
    low = max(-_REACH, min(-1, math.floor(min(log for _, log in bars))))
    high = min(_REACH, max(1, math.ceil(max(log for _, log in bars))))

    def y(log: float) -> float:
        return HEIGHT * (high - min(max(log, low), high)) / (high - low)

    step = WIDTH / len(bars)
    drawn = "".join(_bar(row, log, at * step, step, y) for at, (row, log) in enumerate(bars))
    ticks = range(low, high + 1, max(1, (high - low) // 4))
    lines = "".join(line(y(tick), "grid") for tick in ticks) + line(y(0), "one")
    labels = [(y(tick), f"{2.0**tick:g}x") for tick in sorted({*ticks, 0})]
    head = f"Sparse kernel against dense, {len(bars)} timed nodes in graph order"
    return plot(head, labels, lines + drawn, {"sparse": "chosen", "dense": "declined, dense runs"})


def plot(
    head: str,
    ticks: Iterable[tuple[float, str]],
    drawn: str,
    key: Mapping[str, str],
    below: str = "",
) -> str:
    """A card with `drawn`, SVG in a box of WIDTH x HEIGHT that is stretched to the card's width.

    ticks: y and label on the left; key: class of a mark -> what it stands for; `head`, labels and
    key are HTML-safe; below: HTML under the plot.
    """
    labels = "".join(
        f'<span style="top:{100 * y / HEIGHT:.1f}%">{label}</span>' for y, label in ticks
    )
    said = "".join(f'<span><i class="{style}"></i>{label}</span>' for style, label in key.items())
    return (
        f'<section class="card wide"><h2>{head}</h2><div class="plot"><div class="ticks">{labels}'
        f'</div><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{head}">{drawn}</svg>{below}</div><p class="key">{said}</p></section>'
    )


def _bar(row: Row, log: float, x: float, step: float, y: Callable[[float], float]) -> str:
    top, bottom = min(y(log), y(0)), max(y(log), y(0))
    style = "sparse" if row.kernel else "dense"
    title = escape(words.printable(f"{row.name}: {words.times(row.speedup)} ({row.how})"))
    return (
        f'<rect class="{style}" x="{x + 0.1 * step:.2f}" y="{top:.1f}" width="{0.8 * step:.2f}" '
        f'height="{max(bottom - top, 1):.1f}"><title>{title}</title></rect>'
    )


def line(y: float, style: str) -> str:
    """A line over the whole width of a plot: "grid", or "one" for the line that bars stand on."""
    return f'<line class="{style}" x1="0" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'


def weights(rows: Sequence[Row]) -> str:
    """Dense and stored bytes, summed over nodes whose names end alike; "" for none."""
    kinds: dict[str, tuple[int, int]] = {}
    for row in rows:
        kind = row.name.rpartition(".")[2] or row.op
        dense, stored = kinds.get(kind, (0, 0))
        kinds[kind] = dense + row.dense_bytes, stored + stored_bytes(row)
    bars = sorted(kinds.items(), key=lambda item: -item[1][0])
    if rest := bars[KINDS:]:
        others = sum(pair[0] for _, pair in rest), sum(pair[1] for _, pair in rest)
        bars = [*bars[:KINDS], (f"{len(rest)} other kinds", others)]
    bars = [(kind, pair) for kind, pair in bars if pair[0]]
    if not bars:
        return ""
    most = max(max(pair) for _, pair in bars)
    drawn = "".join(_kind(kind, *pair, most) for kind, pair in bars)
    key = '<i class="sparse"></i>stored now', '<i class="dense"></i>saved against dense'
    return (
        f'<section class="card"><h2>Weight bytes by kind of layer</h2>{drawn}'
        f'<p class="key"><span>{key[0]}</span><span>{key[1]}</span></p></section>'
    )


def _kind(kind: str, dense: int, stored: int, most: int) -> str:
    name = escape(words.printable(kind))
    figures = f"{words.size(stored)} of {words.size(dense)}"
    title = f"<title>{name}: {figures}</title>"
    bars = "".join(
        f'<rect class="{style}" width="{100 * value / most:.2f}" height="16"/>'
        for style, value in (("dense", dense), ("sparse", stored))
    )
    return (
        f'<div class="kind"><span title="{name}">{name}</span><svg viewBox="0 0 100 16" '
        f'preserveAspectRatio="none" role="img" aria-label="{name}: {figures}">{title}{bars}</svg>'
        f"<span>{figures}</span></div>"
    )
