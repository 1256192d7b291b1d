"""spread(): the patterns that an allocation makes of the recipe's, from weights, data or losses.

Each pattern of the recipe is a budget of its own, spread over the weights that it was chosen for; a
knapsack spends what all of them cost together; of Within they are the most.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from sparsefx.allocations import (
    ER,
    ERK,
    OWL,
    Allocation,
    GlobalMagnitude,
    Knapsack,
    Uniform,
    Within,
    ZerothOrder,
)
from sparsefx.errors import InvalidAllocation, MissingCalibration
from sparsefx.patterns import NM, Pattern
from sparsefx.prune.allocation.choose import choose
from sparsefx.prune.allocation.global_magnitude import global_magnitude
from sparsefx.prune.allocation.layers import Layer
from sparsefx.prune.allocation.owl import owl, owl_nm
from sparsefx.prune.allocation.proportional import by_score, er, erk
from sparsefx.prune.allocation.zeroth_order import zeroth_order_scores
from sparsefx.prune.language_loss import losses_of
from sparsefx.prune.layer_of import blocks_of, layer_of
from sparsefx.prune.loss_gradients import squared_gradients
from sparsefx.prune.measure import Data, error_table, outliers_of_blocks
from sparsefx.prune.sensitivity.within import Build, within
from sparsefx.prune.weights import PrunableWeight

Weights = Mapping[str, PrunableWeight]
Patterns = Mapping[str, Pattern]


def spread(
    data: Data, weights: Weights, chosen: Patterns, allocation: Allocation, build: Build
) -> dict[str, Pattern]:
    """The pattern of each weight by name; those that are to stay dense are left out.

    chosen: the recipe's own; build: the model pruned to given patterns, for a metric. Raises
    InvalidAllocation where a pattern cannot be spread that way, ImpossibleBudget, NonFiniteMetric,
    and what `run_blocks` and the model raise.
    """
    layers = layers_of(weights, chosen)
    if isinstance(allocation, Uniform):
        return dict(chosen)
    if isinstance(allocation, Within):
        return within(data, chosen, allocation, build)
    if isinstance(allocation, Knapsack):
        errors = _errors(data, weights, chosen, allocation)
        found = choose(layers, chosen, errors, allocation, data.cache).patterns
        return {
            name: replace(pattern, criterion=chosen[name].criterion)
            for name, pattern in found.items()
            if pattern is not None
        }
    budget = _Budgets(data, weights, layers, allocation)
    spreads = {pattern: budget.of(pattern, chosen) for pattern in dict.fromkeys(chosen.values())}
    return {name: spreads[pattern][name] for name, pattern in chosen.items()}


def _errors(
    data: Data, weights: Weights, chosen: Patterns, allocation: Knapsack
) -> dict[str, list[float]]:
    importance = None
    if allocation.objective == "loss":
        if data.batches is None:
            raise MissingCalibration(what="a knapsack")
        asked = {name: weights[name] for name in chosen}
        importance = squared_gradients(data.model, data.batches, asked)
    return error_table(data, chosen, dict.fromkeys(chosen, allocation.choices), importance)


def layers_of(weights: Weights, chosen: Patterns) -> list[Layer]:
    """The weights that take part, with the repeated blocks that they belong to."""
    blocks = blocks_of({name: weights[name] for name in chosen})
    return [layer_of(weights[name], block) for name, block in blocks.items()]


class _Budgets:
    """Spreads one pattern after the other; what was measured is measured once for all."""

    def __init__(
        self, data: Data, weights: Weights, layers: Sequence[Layer], allocation: Allocation
    ) -> None:
        self._data, self._weights, self._layers = data, weights, layers
        self._allocation = allocation
        self._facts: dict[str, float] | None = None

    def of(self, pattern: Pattern, chosen: Patterns) -> dict[str, Pattern]:
        """What becomes of the weights whose pattern is `pattern`."""
        layers = [layer for layer in self._layers if chosen[layer.name] == pattern]
        allocation = self._allocation
        if isinstance(pattern, NM):
            if not isinstance(allocation, OWL):
                raise InvalidAllocation(
                    what=type(allocation).__name__,
                    rule=f"{pattern} leaves no sparsity to spread",
                    remedy="OWL and Knapsack mix N:M patterns",
                )
            outliers = self._measured(partial(self._outliers, allocation))
            kept = owl_nm(layers, outliers, pattern.n, pattern.m, allocation.nm_spread)
            return {name: replace(pattern, n=n) for name, n in kept.items()}
        shares = self._shares(layers, pattern.sparsity)
        return {name: replace(pattern, sparsity=share) for name, share in shares.items()}

    def _shares(self, layers: Sequence[Layer], sparsity: float) -> dict[str, float]:
        match self._allocation:
            case ER():
                return er(layers, sparsity)
            case ERK():
                return erk(layers, sparsity)
            case OWL() as allocation:
                outliers = self._measured(partial(self._outliers, allocation))
                return owl(layers, outliers, sparsity, allocation.spread)
            case GlobalMagnitude(min_keep=least):
                return global_magnitude(self._tensors(layers), sparsity, least)
            case ZerothOrder() as allocation:
                scores = self._measured(partial(self._scores, allocation))
                return by_score(layers, scores, sparsity, allocation.max_sparsity, allocation.per)
            case other:
                raise AssertionError(other)

    def _measured(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        if self._facts is None:
            self._facts = measure()
        return self._facts

    def _outliers(self, allocation: OWL) -> dict[str, float]:
        blocks = {layer.name: layer.block for layer in self._layers}
        return outliers_of_blocks(self._data, self._weights, blocks, allocation.outlier)

    def _scores(self, allocation: ZerothOrder) -> dict[str, float]:
        loss, count = losses_of(self._data.model, self._data.batches or ())
        return zeroth_order_scores(self._tensors(self._layers), loss, count, allocation)

    def _tensors(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        return {layer.name: self._weights[layer.name].parameter for layer in layers}
