"""scan(): every choice of pattern on every layer of a dense model, and on all layers at once."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from sparsefx.attention.spec import Metric
from sparsefx.calibrate.sequential import Block, Observed, Visited
from sparsefx.errors import InvalidPattern
from sparsefx.patterns import Pattern
from sparsefx.prune.allocation.zeroth_order import restored
from sparsefx.prune.decide import needs_of
from sparsefx.prune.measure import Data, facts_of_blocks, tried_on
from sparsefx.prune.sensitivity.layers import Scan, Trial, kind_of
from sparsefx.prune.sensitivity.metric import dense_value_of, value_of
from sparsefx.prune.sensitivity.within import Build
from sparsefx.prune.weights import PrunableWeight

Laid = Mapping[str, Sequence[Pattern | str]]
"""By weight, each choice under its criterion, or why it does not fit."""


@dataclass(frozen=True)
class Asked:
    """What is to be tried.

    chosen: the recipe's pattern of each weight, whose criterion decides; groups: of each weight,
    what is pruned with it for the metric; build: the model pruned to given patterns.
    """

    weights: Mapping[str, PrunableWeight]
    chosen: Mapping[str, Pattern]
    choices: Sequence[Pattern]
    groups: Mapping[str, str]
    metric: Metric | None
    build: Build


def scan(data: Data, asked: Asked) -> tuple[Scan, list[Scan]]:
    """What all layers together bear, and each one, in model order.

    The model is as it was, bit for bit, after an exception too. Raises NonFiniteMetric, and what
    `run_blocks`, `asked.build` and the metric raise.
    """
    dense = None if asked.metric is None else dense_value_of(asked.metric, data.model)
    laid = {name: [_laid(c, asked, name) for c in asked.choices] for name in asked.chosen}
    visit = _Visit(data, asked, laid)
    found = facts_of_blocks(data, needs_of(asked.chosen, exact=True), visit, "sensitivity")
    scans = [
        Scan(
            name=name,
            group=asked.groups[name],
            weights=asked.weights[name].parameter.numel(),
            criterion=type(pattern.criterion).__name__,
            dense=dense,
            trials=tuple(_trials(asked.choices, laid[name], found[name])),
        )
        for name, pattern in asked.chosen.items()
    ]
    return _whole(asked, laid, scans, dense), scans


def _laid(choice: Pattern, asked: Asked, name: str) -> Pattern | str:
    try:
        pattern = replace(choice, criterion=asked.chosen[name].criterion)
    except InvalidPattern as error:  # a criterion that cannot do this kind of pattern
        return str(error.fields["rule"])
    return pattern.misfit(asked.weights[name].fit_shape) or pattern


@dataclass(frozen=True)
class _Visit:
    """Tries all choices on a block's layers; new weights are in the model for the metric alone."""

    data: Data
    asked: Asked
    laid: Laid

    def __call__(self, block: Block) -> Visited:
        groups: dict[str, dict[str, Observed]] = {}
        for name, layer in block.layers.items():
            groups.setdefault(self.asked.groups[name], {})[name] = layer
        facts: dict[str, list[object]] = {name: [] for name in block.layers}
        for layers in groups.values():
            for number in range(len(self.asked.choices)):
                errors, metric = self._try(layers, number)
                for name in layers:
                    facts[name].append([errors.get(name), metric])
        return Visited(facts=facts)

    def _try(
        self, layers: Mapping[str, Observed], number: int
    ) -> tuple[dict[str, float], float | None]:
        """Errors of those that the choice fits, and the metric with all of them pruned."""
        errors = {}
        metric = self.asked.metric
        with ExitStack() as stack:
            for name, layer in layers.items():
                pattern = self.laid[name][number]
                if isinstance(pattern, str):
                    continue
                solved, errors[name] = tried_on(layer, pattern)
                if metric is not None:
                    parameter = layer.weight.parameter
                    stack.enter_context(restored(parameter))
                    parameter.copy_(layer.weight.as_stored(solved.weight))
            if metric is None or not errors:
                return errors, None
            return errors, value_of(metric, self.data.model)


def _trials(
    choices: Sequence[Pattern],
    laid: Sequence[Pattern | str],
    found: Sequence[tuple[float | None, float | None]],
) -> Iterator[Trial]:
    for choice, pattern, (error, metric) in zip(choices, laid, found, strict=True):
        if isinstance(pattern, str):
            error, metric = None, None
        reason = pattern if isinstance(pattern, str) else ""
        yield _trial(choice, error, metric, reason)


def _trial(choice: Pattern, error: float | None, metric: float | None, reason: str) -> Trial:
    if metric is not None and not math.isfinite(metric):
        metric = None
    return Trial(str(choice), kind_of(choice), choice.sparsity, error, metric, reason)


def _whole(asked: Asked, laid: Laid, scans: Sequence[Scan], dense: float | None) -> Scan:
    """Mean errors, and the metric with all layers pruned at once, each on pruned inputs."""
    trials = []
    for number, choice in enumerate(asked.choices):
        tries = {name: each[number] for name, each in laid.items()}
        patterns = {name: each for name, each in tries.items() if not isinstance(each, str)}
        errors = [scan.trials[number].error for scan in scans]
        known = [error for error in errors if error is not None]
        metric = None
        if asked.metric is not None and patterns:
            metric = value_of(asked.metric, asked.build(patterns))
        mean = math.fsum(known) / len(known) if known else None
        trials.append(_trial(choice, mean, metric, "" if known else "it fits no layer"))
    criteria = dict.fromkeys(scan.criterion for scan in scans)
    weights = sum(scan.weights for scan in scans)
    return Scan("", "", weights, ", ".join(criteria), dense, tuple(trials))
