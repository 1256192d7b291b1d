"""Which pattern each layer gets from a knapsack: budget, costs and measured errors joined."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsefx import devices
from sparsefx.allocations import Knapsack
from sparsefx.errors import ImpossibleBudget
from sparsefx.patterns import Pattern
from sparsefx.prune.allocation.costs import cost
from sparsefx.prune.allocation.knapsack import Choice, Selection, knapsack
from sparsefx.prune.allocation.layers import Layer

Price = Callable[[Pattern | None, Layer], int]


@dataclass(frozen=True)
class Chosen:
    """The pattern of each layer by name, None for dense; the budget, and how it was used."""

    patterns: Mapping[str, Pattern | None]
    budget: int
    selection: Selection


def choose(
    layers: Sequence[Layer],
    asked: Mapping[str, Pattern | None],
    errors: Mapping[str, Sequence[float]],
    allocation: Knapsack,
    cache: Path | None = None,
) -> Chosen:
    """The patterns of least summed error within the budget of `allocation`.

    asked: the recipe's own pattern of each layer, by name, whose cost is the budget unless
    `allocation.share` is given. errors: of each layer, one for each of `allocation.choices` in
    their order; those of choices that do not fit the layer are not read. cache: where the speed of
    a "cpu" target is kept, as in `devices.named`.

    Raises ImpossibleBudget, InvalidAllocation as `knapsack` does, and UnknownOption.
    """
    price = _price(allocation, cache)
    budget = _budget(layers, asked, allocation, price)
    table = [_choices(layer, errors[layer.name], allocation, price) for layer in layers]
    selection = knapsack(table, budget)
    patterns = {
        layer.name: allocation.choices[position]
        for layer, position in zip(layers, selection.chosen, strict=True)
    }
    return Chosen(patterns, budget, selection)


def fits(pattern: Pattern | None, layer: Layer) -> bool:
    """Whether `pattern` can be laid on the layer; None, dense, always can."""
    return pattern is None or pattern.misfit(torch.Size(layer.shape[:2])) is None


def _price(allocation: Knapsack, cache: Path | None) -> Price:
    """`cost` under the allocation's budget, found once for layers of one shape."""
    device = None if allocation.target is None else devices.named(allocation.target, cache)
    known: dict[tuple[object, ...], int] = {}

    def price(pattern: Pattern | None, layer: Layer) -> int:
        key = (pattern, layer.shape, layer.dtype, layer.parts)
        if key not in known:
            known[key] = cost(pattern, layer, allocation.budget, device, allocation.rows)
        return known[key]

    return price


def _budget(
    layers: Sequence[Layer],
    asked: Mapping[str, Pattern | None],
    allocation: Knapsack,
    price: Price,
) -> int:
    if allocation.share is None:
        return sum(price(asked[layer.name], layer) for layer in layers)
    return int(allocation.share * sum(price(None, layer) for layer in layers))


def _choices(
    layer: Layer, errors: Sequence[float], allocation: Knapsack, price: Price
) -> list[Choice]:
    fitting = [fits(pattern, layer) for pattern in allocation.choices]
    if not any(fitting):
        raise ImpossibleBudget(
            rule=f"no choice fits {layer.name} of shape {layer.shape}",
            remedy="Allow None, which is dense, too",
        )
    return [
        Choice(price(pattern, layer), error) if fit else Choice(0, math.inf)
        for pattern, error, fit in zip(allocation.choices, errors, fitting, strict=True)
    ]
