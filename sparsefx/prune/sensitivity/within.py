"""The sparsest patterns within a bound on each layer's output error, or on the model's metric.

A ladder is a pattern and its milder forms, sparsest first; past its end is dense. Errors are
assumed to fall along it: that spares measuring every rung, and no bound is ever broken by it.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from sparsefx.allocations import Within
from sparsefx.calibrate.sequential import Block, Observed, Visited
from sparsefx.patterns import NM, Pattern
from sparsefx.prune.decide import needs_of
from sparsefx.prune.measure import Data, error_table, facts_of_blocks, tried_on
from sparsefx.prune.sensitivity.metric import dense_value_of, value_of, worst_allowed
from sparsefx.prune.solve import Solved

Patterns = Mapping[str, Pattern]
Build = Callable[[Patterns], nn.Module]
"""The model pruned to a pattern for each weight by name, as the caller will prune it."""

EVALUATIONS = 8
_STEPS = 20  # of sparsity from 0 to 1
_NAMED = 5  # layers that a warning names


class LayersStayDense(UserWarning):
    """Layers that no pattern of their kind keeps within the bound that was asked for."""


def ladder(pattern: Pattern) -> list[Pattern]:
    """`pattern` and what is milder, sparsest first: multiples of 5 points, or n:m to (m-1):m."""
    if isinstance(pattern, NM):
        return [replace(pattern, n=n) for n in range(pattern.n, pattern.m)]
    shares = [step / _STEPS for step in range(_STEPS - 1, 0, -1)]
    milder = [share for share in shares if share < pattern.sparsity - 1e-9]
    return [pattern, *(replace(pattern, sparsity=share) for share in milder)]


def within(data: Data, chosen: Patterns, allocation: Within, build: Build) -> dict[str, Pattern]:
    """The sparsest pattern of each weight within the bound; those that stay dense are left out.

    Warns of those (LayersStayDense). Raises MissingCalibration, NonFiniteMetric, and what
    `run_blocks`, `build` and the metric raise.
    """
    ladders = {name: ladder(pattern) for name, pattern in chosen.items()}
    if allocation.error is not None:
        found, errors = _within_error(data, chosen, ladders, allocation.error)
    else:
        found, errors = _within_metric(data, chosen, ladders, allocation, build)
    patterns = {name: ladders[name][at] for name, at in found.items() if at < len(ladders[name])}
    _warn_of_dense({name: errors[name] for name in chosen if name not in patterns}, ladders)
    return patterns


Found = tuple[dict[str, int], dict[str, float]]
"""By name: the rung, one past the last for dense, and the error on the mildest rung."""


def _within_error(
    data: Data, chosen: Patterns, ladders: Mapping[str, Sequence[Pattern]], bound: float
) -> Found:
    visit = _Search(ladders, bound)
    facts = facts_of_blocks(data, needs_of(chosen, exact=True), visit, "output errors")
    return {name: fact[0] for name, fact in facts.items()}, {
        name: fact[1] for name, fact in facts.items()
    }


@dataclass(frozen=True)
class _Search:
    """A visit that prunes each layer as far as the bound lets it, for the blocks that follow."""

    ladders: Mapping[str, Sequence[Pattern]]
    bound: float

    def __call__(self, block: Block) -> Visited:
        weights: dict[str, Tensor] = {}
        facts: dict[str, object] = {}
        for name, layer in block.layers.items():
            at, error, solved = self._sparsest(layer, self.ladders[name])
            facts[name] = [at, error]
            if solved is not None:
                matrix = layer.weight.as_stored(solved.weight)
                weights[name] = matrix.to(layer.weight.parameter.dtype)
        return Visited(weights, facts)

    def _sparsest(
        self, layer: Observed, rungs: Sequence[Pattern]
    ) -> tuple[int, float, Solved | None]:
        """The first rung within the bound, its error or the mildest rung's, the weight there."""
        error, best = 0.0, None

        def holds(at: int) -> bool:
            nonlocal error, best
            solved, measured = tried_on(layer, rungs[at])
            within = measured <= self.bound
            if within:
                best = solved
            if within or at == len(rungs) - 1:
                error = measured
            return within

        return first(len(rungs), holds), error, best


def first(count: int, holds: Callable[[int], bool]) -> int:
    """The first of 0..count-1 that holds, if all after it do too; `count` if the last does not.

    0 is asked first, as it is hoped for; the rest is bisection. What is returned was asked.
    """
    if count == 0 or holds(0):
        return 0
    low, high = 1, count
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _within_metric(
    data: Data,
    chosen: Patterns,
    ladders: Mapping[str, Sequence[Pattern]],
    allocation: Within,
    build: Build,
) -> Found:
    """Bisects over how many moves, each of one layer by one rung, are made before the metric holds.

    All layers move once before any moves twice (on ladders of one length), those that err most
    first. Of MiniLM under Wanda at 45 % this loses 0.106 of the cosine with dense, where one bound
    on all errors loses 0.137 at the same sparsity and the least sum of squared errors 0.165.
    """
    metric, drop = allocation.metric, allocation.drop
    assert metric is not None and drop is not None
    most = worst_allowed(dense_value_of(metric, data.model), drop)
    table = error_table(data, chosen, ladders)
    moves = _moves(table)
    last = {name: math.sqrt(errors[-1]) for name, errors in table.items()}
    best = {name: len(rungs) for name, rungs in ladders.items()}
    low, high, middle = 0, len(moves), 0
    for _ in range(EVALUATIONS - 1):
        if low == high:
            break
        made = Counter(moves[:middle])
        rungs = {name: made[name] for name in ladders}
        patterns = {
            name: ladders[name][at] for name, at in rungs.items() if at < len(ladders[name])
        }
        if value_of(metric, build(patterns)) <= most:
            best, high = rungs, middle
        else:
            low = middle + 1
        middle = (low + high) // 2
    return best, last


def _moves(table: Mapping[str, Sequence[float]]) -> list[str]:
    """The names of the layers in the order in which they move by a rung, until all are dense."""
    moves = [
        (at / len(errors), -error, name)
        for name, errors in table.items()
        for at, error in enumerate(errors)
    ]
    return [name for _, _, name in sorted(moves)]


def _warn_of_dense(errors: Mapping[str, float], ladders: Mapping[str, Sequence[Pattern]]) -> None:
    """errors: on the mildest rung, of the layers that stay dense."""
    if not errors:
        return
    worst = sorted(errors, key=lambda name: -errors[name])
    named = ", ".join(
        f"{name} (output error {errors[name]:.3g} at {ladders[name][-1]})"
        for name in worst[:_NAMED]
    )
    more = f" and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
    warnings.warn(
        f"{len(errors)} of {len(ladders)} layers stay dense, as no pattern of their kind keeps "
        f"within the bound: {named}{more}; allow more, or exclude them in the recipe",
        LayersStayDense,
        stacklevel=2,
    )
