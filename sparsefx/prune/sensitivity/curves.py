"""Curves of a scan as inline SVG, one line a layer over sparsity: output error, and the metric."""

import math
from collections.abc import Callable, Mapping, Sequence

from sparsefx import report_words as words
from sparsefx.prune.report.charts import Axis
from sparsefx.prune.sensitivity.knee import Point
from sparsefx.prune.sensitivity.layers import Scan
from sparsefx.report_charts import HEIGHT, WIDTH, line, plot
from sparsefx.report_page import text

_FRAGILE = 5  # layers whose lines stand out
_MOST_RISE = 1.0  # where the axis of the metric ends: what is beyond twice dense is lost anyway


def charts(whole: Scan, layers: Sequence[Scan]) -> str:
    """Both charts; one that there are no numbers for is left out."""
    errors = _chart(
        "Output error by sparsity",
        whole,
        layers,
        lambda scan: scan.errors(),
        (whole.error_knee, "knee of the mean"),
        math.inf,
        lambda value: f"{value:g}",
    )
    return errors + _chart(
        "How much worse the metric is by sparsity",
        whole,
        layers,
        lambda scan: scan.rises(),
        (whole.bears, "what all layers together bear"),
        _MOST_RISE,
        words.share,
    )


def _chart(
    head: str,
    whole: Scan,
    layers: Sequence[Scan],
    points: Callable[[Scan], list[Point]],
    knee: tuple[float | None, str],
    most: float,
    label: Callable[[float], str],
) -> str:
    curves = {scan.name: points(scan) for scan in (whole, *layers)}
    values = [min(y, most) for curve in curves.values() for _, y in curve]
    levels = sorted({x for curve in curves.values() for x, _ in curve})
    if not values or not levels[-1]:
        return ""
    axis, right = Axis.upto(values), levels[-1]
    fragile = _steepest(curves, layers) if len(layers) > 1 else set()
    marks = [axis.step * tick for tick in range(round(axis.top / axis.step) + 1)]
    drawn = "".join(line(axis.y(mark), "grid") for mark in marks) + line(HEIGHT, "one")
    plain = [scan for scan in layers if scan.name not in fragile]
    for style, scans in (
        ("dense", plain),
        ("fragile", [scan for scan in layers if scan.name in fragile]),
        ("sparse", [whole]),
    ):
        drawn += "".join(_curve(scan, curves[scan.name], style, axis, right) for scan in scans)
    key = {"sparse": "all layers"} | ({"fragile": "most fragile"} if fragile else {})
    key |= {"dense": "other layers"} if plain else {}
    if knee[0] is not None:
        x = f"{WIDTH * knee[0] / right:.1f}"
        drawn += f'<line class="knee" x1="{x}" x2="{x}" y1="0" y2="{HEIGHT}"/>'
        key |= {"knee": f"{knee[1]}, {words.share(knee[0])}"}
    return plot(head, [(axis.y(mark), label(mark)) for mark in marks], drawn, key, _under(levels))


def _steepest(curves: Mapping[str, Sequence[Point]], layers: Sequence[Scan]) -> set[str]:
    """The layers whose curves are highest in the mean."""
    means = {
        scan.name: math.fsum(y for _, y in curves[scan.name]) / len(curves[scan.name])
        for scan in layers
        if curves[scan.name]
    }
    return set(sorted(means, key=lambda name: -means[name])[:_FRAGILE])


def _curve(scan: Scan, points: Sequence[Point], style: str, axis: Axis, right: float) -> str:
    if not points:
        return ""
    path = " ".join(f"{WIDTH * x / right:.1f},{axis.y(y):.1f}" for x, y in points)
    said = ", ".join(f"{words.share(x)}: {words.figure(y)}" for x, y in points[1:])
    return f'<polyline class="{style}" points="{path}"><title>{text(f"{scan.label}: {said}")}' + (
        "</title></polyline>"
    )


def _under(levels: Sequence[float]) -> str:
    """The levels that were tried, under the plot."""
    right = levels[-1]
    labels = "".join(
        f'<span style="left:{100 * level / right:.2f}%">{words.share(level)}</span>'
        for level in levels
    )
    return f'<div class="levels">{labels}</div>'
