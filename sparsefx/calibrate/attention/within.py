"""A budget cut until the user's own loss of the model bears it."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from sparsefx.attention.spec import Metric, SkipSoftmax
from sparsefx.attention.thresholds import AttentionThresholds
from sparsefx.calibrate.attention.skips import SkipStatistics
from sparsefx.calibrate.attention.solve import solve, thresholds
from sparsefx.entry import inferring

Build = Callable[[Mapping[str, AttentionThresholds]], nn.Module]
EVALUATIONS = 6


def back_off(
    model: nn.Module,
    spec: SkipSoftmax,
    sites: Mapping[str, SkipStatistics],
    found: Mapping[str, AttentionThresholds],
    build: Build,
) -> dict[str, AttentionThresholds]:
    """`found` with the most demanding thresholds of `sites` whose loss stays within the bound.

    Tries the goal (sparsity or error) itself, then halves the interval between it and
    skipping nothing: spec.metric is evaluated at most 6 times, once of them on `model`, the dense
    one; no data is run through the model beside that. Keeps metric <= (1 + spec.within) * dense.
    If even the last trial is worse, nothing is skipped.
    """
    metric = spec.metric
    assert metric is not None
    most = _loss(metric, model) * (1 + spec.within)
    low, high, goal = 0.0, 1.0, 1.0
    best = {**found, **_scaled(spec, sites, 0.0)}
    for _ in range(EVALUATIONS - 1):
        trial = {**found, **_scaled(spec, sites, goal)}
        if _loss(metric, build(trial)) <= most:
            best, low = trial, goal
        else:
            high = goal
        if low == high:
            break
        goal = (low + high) / 2
    return best


def _loss(metric: Metric, model: nn.Module) -> float:
    """In eval mode and without gradients: with them on, a compiled model stays dense."""
    with inferring(model), torch.no_grad():
        return float(metric(model))


def _scaled(
    spec: SkipSoftmax, sites: Mapping[str, SkipStatistics], share: float
) -> Mapping[str, AttentionThresholds]:
    """The thresholds of `share` of the goal."""
    if not share:
        return {name: thresholds(each) for name, each in sites.items()}
    if spec.sparsity is not None:
        return solve(replace(spec, sparsity=spec.sparsity * share), sites)
    assert spec.error is not None
    return solve(replace(spec, error=spec.error * share), sites)
