"""How far a curve over sparsity can be followed: the "essential sparsity" of a layer or a model.

Jaiswal et al. 2023, arXiv 2306.03805: the sparsity beyond which one-shot pruning suddenly hurts.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from sparsefx.prune.sensitivity.metric import worst_allowed

DROP = 0.01
"""The share by which a metric may be worse than dense at the largest bearable sparsity."""

Point = tuple[float, float]
"""Sparsity, and the value there."""


def knee(points: Sequence[Point]) -> float:
    """The sparsity at which the curve bends up most: the largest second difference on the scan,

        2 (slope after - slope before) / (distance of the levels before and after).

    points: by ascending sparsity, from dense on, at least one. The first of equals. Where a value
    is infinite, the level before it; where the curve nowhere bends up, the last level.
    """
    finite = _finite(points)
    if len(finite) < len(points):
        return finite[-1][0] if finite else points[0][0]
    slopes = [(y - b) / (x - a) for (a, b), (x, y) in pairwise(points)]
    steepest, found = max((abs(slope) for slope in slopes), default=0.0) * 1e-9, points[-1][0]
    for at, (before, after) in enumerate(pairwise(slopes), start=1):
        bend = 2 * (after - before) / (points[at + 1][0] - points[at - 1][0])
        if bend > steepest * (1 + 1e-9):
            steepest, found = bend, points[at][0]
    return found


def bearable(points: Sequence[Point], drop: float = DROP) -> float:
    """The level before the first whose value is worse than dense by more than the share `drop`.

    points: as for `knee`, the first is dense; a larger value is worse.
    """
    most = worst_allowed(points[0][1], drop)
    found = points[0][0]
    for sparsity, value in points:
        if not value <= most:
            break
        found = sparsity
    return found


def _finite(points: Sequence[Point]) -> Sequence[Point]:
    """The points before the first that is not finite."""
    count = next((at for at, (_, y) in enumerate(points) if not math.isfinite(y)), len(points))
    return points[:count]
