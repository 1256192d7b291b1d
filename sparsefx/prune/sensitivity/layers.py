"""What a scan found of each layer: one Trial a choice of pattern, and the knees over them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsefx.patterns import NM, Block, Pattern
from sparsefx.prune.sensitivity.knee import Point, bearable, knee


@dataclass(frozen=True)
class Trial:
    """One choice on one layer.

    pattern: "2:4", "unstructured 50%"; kind: what is equal along a curve, "n:4", "unstructured";
    sparsity: that the pattern asks for; error: ||(W - W')X|| / ||W X|| on dense inputs; metric: of
    the model, None where none was asked for, or where it gave no finite number; reason: why the
    choice was not tried, else "".
    """

    pattern: str
    kind: str
    sparsity: float
    error: float | None
    metric: float | None
    reason: str


@dataclass(frozen=True)
class Scan:
    """What one layer, or all layers together, can bear.

    name: the parameter's, "" for all layers together, whose error is the mean over the layers;
    group: what was pruned at once for the metric, the weight itself or its block; weights: number
    of elements; criterion: "Wanda"; dense: the metric of the dense model, None without one.
    """

    name: str
    group: str
    weights: int
    criterion: str
    dense: float | None
    trials: tuple[Trial, ...]

    @property
    def label(self) -> str:
        """The name without the ".weight" that nearly all have in common."""
        return self.name.removesuffix(".weight") or "all layers"

    @property
    def curve(self) -> list[Trial]:
        """The trials of the kind with most levels, by sparsity; [] where no kind has two."""
        kinds: dict[str, dict[float, Trial]] = {}
        for trial in self.trials:
            if not trial.reason:
                kinds.setdefault(trial.kind, {})[trial.sparsity] = trial
        most = max(kinds.values(), key=len, default={})
        return [most[level] for level in sorted(most)] if len(most) > 1 else []

    @property
    def error_knee(self) -> float | None:
        """The sparsity at which the error bends up most (`knee`), None without a curve."""
        points = self.errors()
        return knee(points) if points else None

    @property
    def metric_knee(self) -> float | None:
        """The sparsity at which the metric bends up most, None without a metric or a curve."""
        points = self.metrics()
        return knee(points) if points else None

    @property
    def bears(self) -> float | None:
        """The last level before the metric is worse than dense by more than 1 %."""
        points = self.metrics()
        return bearable(points) if points else None

    @property
    def fragility(self) -> float:
        """The mean rise of the metric, or without one the mean error, over the curve."""
        values = [y for _, y in self.rises() or self.errors()]
        return math.fsum(values) / len(values) if values else 0.0

    def errors(self) -> list[Point]:
        """(sparsity, error) along the curve, from dense on; [] without a curve."""
        curve = self.curve
        points = [(trial.sparsity, trial.error) for trial in curve if trial.error is not None]
        return _from_dense(points, 0.0)

    def metrics(self) -> list[Point]:
        """(sparsity, metric) along the curve, from dense on; infinite where it was no number."""
        if self.dense is None:
            return []
        points = [
            (trial.sparsity, math.inf if trial.metric is None else trial.metric)
            for trial in self.curve
        ]
        return _from_dense(points, self.dense)

    def rises(self) -> list[Point]:
        """(sparsity, rise of the metric) along the curve, from dense on."""
        return [(sparsity, self._rise(value)) for sparsity, value in self.metrics()]

    def rise_of(self, trial: Trial) -> float | None:
        """By which share of its dense value the metric is worse; None where it was not asked."""
        if self.dense is None or trial.reason:
            return None
        return self._rise(math.inf if trial.metric is None else trial.metric)

    def _rise(self, value: float) -> float:
        dense = self.dense or 0.0
        return (value - dense) / (abs(dense) or 1.0)

    def violations(self) -> list[str]:
        """What cannot be so: a sparsity outside [0, 1), an error that is NaN; else []."""
        found = [f"weights is {self.weights}"] if self.weights < 0 else []
        for trial in self.trials:
            if not 0 <= trial.sparsity < 1:
                found.append(f"sparsity of {trial.pattern} is {trial.sparsity}")
            if trial.error is not None and not 0 <= trial.error < math.inf:
                found.append(f"error of {trial.pattern} is {trial.error}")
        numbers = (self.dense, *(trial.metric for trial in self.trials))
        found += [f"a metric is {x}" for x in numbers if x is not None and not math.isfinite(x)]
        return [f"{self.label}: {text}" for text in found]


def kind_of(pattern: Pattern) -> str:
    """What patterns that differ in sparsity alone have in common."""
    if isinstance(pattern, NM):
        return f"n:{pattern.m}"
    if isinstance(pattern, Block):
        return f"block {pattern.rows}x{pattern.cols}"
    return type(pattern).__name__.lower()


def most_fragile(scans: Sequence[Scan]) -> list[Scan]:
    """By falling fragility."""
    return sorted(scans, key=lambda scan: -scan.fragility)


def _from_dense(points: list[Point], dense: float) -> list[Point]:
    """From (0, dense) on; a choice of sparsity 0 is dense itself."""
    return [(0.0, dense), *(point for point in points if point[0] > 0)] if points else []
