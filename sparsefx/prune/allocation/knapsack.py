"""The multi-choice knapsack: one choice a layer, least summed error within a budget, exactly.

    minimise sum_l error[l, c_l]      where      sum_l cost[l, c_l] <= budget

Branch and bound over layers, all partial solutions of the same layers at once. Let F_k(r) be the
linear relaxation of layers k, k + 1, ...: the lower convex hull of each layer's choices, walked by
falling gain of error per cost until r is spent (Sinha and Zoltners 1979). A partial solution of
cost c and error e over the layers before k

    ends no better than       e + F_k(budget - c)          its bound
    ends at least as well as  e + G_k(budget - c)          G_k: whole steps of that walk only

and is dropped if another one costs no more at no more error, or if its bound is no better than the
best end found so far. Layers are branched on in the order of what their second best choice adds to
the relaxation: those near the break of the walk, which make the difference, come first (Pisinger
1995, "A minimal algorithm for the multiple-choice knapsack problem"). Then few partial solutions
are alive at any time, whatever the size of the numbers.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsefx.errors import ImpossibleBudget, InvalidAllocation

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Ends that differ by less, relative to the whole error, are one and the same to float64 sums.
_ROUNDING = 1e-12
MOST_STATES = 1 << 16


class Choice(NamedTuple):
    """What one choice of a layer costs, a whole number from 0 on, and its error, from 0 on.

    An infinite error means that the choice is not to be taken.
    """

    cost: int
    error: float


@dataclass(frozen=True)
class Selection:
    """The choice of each layer, as its position among the layer's choices; their summed cost and
    error, and `bound`: what no selection within the budget can go below."""

    chosen: tuple[int, ...]
    cost: int
    error: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the error may be above the least one, relative to the error; 0 if it is exact."""
        return (self.error - self.bound) / self.error if self.error > self.bound else 0.0


def knapsack(
    layers: Sequence[Sequence[Choice]], budget: int, most_states: int = MOST_STATES
) -> Selection:
    """The selection of least error whose cost is at most `budget`.

    Exact, up to 1e-12 of the error, as long as no more than `most_states` partial solutions are
    alive at once, which holds whenever the budget beyond the cheapest choices is at most
    `most_states` units of the costs' common divisor, and in practice far beyond. Otherwise those of
    the worst bound are let go, and `Selection.bound` says what is still proven. Among equal
    selections the answer is deterministic. Memory: some 8 bytes a layer and partial solution.

    Raises ImpossibleBudget if the cheapest choices exceed `budget` or a layer has no choice,
    InvalidAllocation for a cost or an error that is negative or no number.
    """
    items = [_Item.of(number, choices) for number, choices in enumerate(layers)]
    base = sum(int(item.costs[0]) for item in items)
    if base > budget:
        raise ImpossibleBudget(
            rule=f"the cheapest choices of all layers cost {base} and {budget} may be spent",
            remedy="Raise the budget, or allow sparser choices",
        )
    items, room = _reduced(items, budget - base)
    order = _order(items, room)
    picks, proven = _Search([items[i] for i in order], room, most_states).run()
    position = dict(zip(order, picks, strict=True))
    chosen = tuple(int(item.index[position[i]]) for i, item in enumerate(items))
    taken = [choices[pick] for choices, pick in zip(layers, chosen, strict=True)]
    error = math.fsum(choice.error for choice in taken)
    floor = math.fsum(float(item.least) for item in items)
    bound = error if proven is None else min(error, floor + proven)
    return Selection(chosen, sum(choice.cost for choice in taken), error, bound)


class _Step(NamedTuple):
    """One step along a hull: cost spent, error gained, and slope = -gain / cost."""

    slope: float
    cost: int
    gain: float


@dataclass(frozen=True)
class _Item:
    """A layer's choices that no other one beats: rising cost, falling error.

    costs: above the cheapest, in units, after `_reduced`; errors: above `least`, the lowest;
    index: position among the layer's choices as given.
    """

    costs: Ints
    errors: Floats
    index: Ints
    least: float

    @classmethod
    def of(cls, number: int, choices: Sequence[Choice]) -> "_Item":
        for cost, error in choices:
            if not 0 <= cost < 2**53 or cost != int(cost) or not error >= 0:
                raise InvalidAllocation(
                    what=f"a choice of cost {cost} and error {error} (layer {number})",
                    rule="costs are whole numbers in [0, 2**53) and errors numbers from 0 on",
                    remedy="Look for NaN in the weights or the calibration inputs",
                )
        best: list[int] = []
        for i in sorted(range(len(choices)), key=lambda i: (choices[i].cost, choices[i].error, i)):
            if choices[i].error < (choices[best[-1]].error if best else math.inf):
                best.append(i)
        if not best:
            raise ImpossibleBudget(
                rule=f"no choice fits layer {number}", remedy="Allow None, which is dense, too"
            )
        errors = np.array([choices[i].error for i in best])
        costs = np.array([choices[i].cost for i in best], dtype=np.int64)
        return cls(costs, errors - errors[-1], np.array(best), float(errors[-1]))

    def hull(self) -> Iterator[_Step]:
        """The steps of its lower convex hull, from the cheapest choice on, slopes rising."""
        at, slope = 0, -math.inf
        while at + 1 < len(self.costs):
            costs = self.costs[at + 1 :] - self.costs[at]
            gains = self.errors[at] - self.errors[at + 1 :]
            best = int(np.argmax(gains / costs))
            # Points on one line may turn back by a rounding error, and steps would change places.
            slope = max(slope, -float(gains[best] / costs[best]))
            yield _Step(slope, int(costs[best]), float(gains[best]))
            at += best + 1


def _reduced(items: Sequence[_Item], room: int) -> tuple[list[_Item], int]:
    """The same problem in costs above each layer's cheapest, in units of their common divisor."""
    above = [item.costs - item.costs[0] for item in items]
    unit = math.gcd(*(int(cost) for costs in above for cost in costs)) or 1
    reduced = [
        _Item(costs // unit, item.errors, item.index, item.least)
        for costs, item in zip(above, items, strict=True)
    ]
    return reduced, room // unit


class _Walk:
    """The steps of all hulls, steepest first, and whose they are."""

    def __init__(self, items: Sequence[_Item]) -> None:
        steps = [(step, owner) for owner, item in enumerate(items) for step in item.hull()]
        steps.sort(key=lambda entry: entry[0].slope)  # stable: an item's steps stay in order
        self.owners = np.array([owner for _, owner in steps], dtype=np.int64)
        self.costs = np.array([step.cost for step, _ in steps], dtype=np.float64)
        self.gains = np.array([step.gain for step, _ in steps], dtype=np.float64)

    def rest(self, first: int) -> "_Relaxation":
        """F and G of the items from `first` on."""
        mine = self.owners >= first
        return _Relaxation(self.costs[mine], self.gains[mine])

    def slope(self, room: int) -> float:
        """Error gained per cost by the step at which `room` ends, 0 if there is enough for all."""
        step = int(np.searchsorted(np.cumsum(self.costs), room, side="right"))
        return float(self.gains[step] / self.costs[step]) if step < len(self.costs) else 0.0


class _Relaxation:
    """F and G of some layers: the least error as a function of the cost that may be spent."""

    def __init__(self, costs: Floats, gains: Floats) -> None:
        self.costs = np.concatenate(([0.0], np.cumsum(costs)))
        # All steps lead to error 0. Summed from there, small errors do not drown in large ones.
        self.errors = np.concatenate((np.cumsum(gains[::-1])[::-1], [0.0]))

    def bound(self, room: Floats) -> Floats:
        """F: a fraction of the last step counts."""
        return np.interp(room, self.costs, self.errors)

    def reached(self, room: Floats) -> Floats:
        """G: whole steps only."""
        return self.errors[np.searchsorted(self.costs, room, side="right") - 1]


def _order(items: Sequence[_Item], room: int) -> list[int]:
    """Items by what their second best choice adds to the Lagrangian error + slope * cost."""
    slope = _Walk(items).slope(room)

    def second(i: int) -> float:
        prices = np.sort(items[i].errors + slope * items[i].costs)
        return float(prices[1] - prices[0]) if len(prices) > 1 else math.inf

    return sorted(range(len(items)), key=second)


class _States(NamedTuple):
    """Partial solutions: cost and error, the one they extend (`parent`) and by which choice."""

    costs: Ints
    errors: Floats
    parent: NDArray[np.int32]
    choice: NDArray[np.int16]

    def at(self, which: NDArray[np.int64]) -> "_States":
        """The states at these positions."""
        costs, errors, parent, choice = self
        return _States(costs[which], errors[which], parent[which], choice[which])


class _Search:
    """Branch and bound over `items` in the order given, `room` units to spend."""

    def __init__(self, items: Sequence[_Item], room: int, most_states: int) -> None:
        self.items, self.room, self.most_states = items, room, most_states
        self.walk = _Walk(items)
        relaxed = self.walk.rest(0).bound(np.array([room], dtype=np.float64))[0]
        self.rounding = _ROUNDING * (math.fsum(item.least for item in items) + float(relaxed))
        self.dropped = math.inf  # the least bound among states that were let go

    def run(self) -> tuple[list[int], float | None]:
        """The choice of each item, and what the error is proven not to go below, None if exact."""
        nothing = np.zeros(1)
        states = _States(
            nothing.astype(np.int64), nothing, nothing.astype(np.int32), nothing.astype(np.int16)
        )
        history = []
        for number, item in enumerate(self.items):
            states = self._pruned(_extended(states, item), number + 1)
            history.append((states.parent, states.choice))
        end = int(np.argmin(states.errors))
        proven = self.dropped if self.dropped < states.errors[end] else None
        picks = []
        for parent, choice in reversed(history):
            picks.append(int(choice[end]))
            end = int(parent[end])
        return picks[::-1], proven

    def _pruned(self, states: _States, number: int) -> _States:
        """The states over `number` items that may still lead to the best end."""
        rest = self.walk.rest(number)
        states = states.at(np.flatnonzero(states.costs <= self.room))
        room = (self.room - states.costs).astype(np.float64)
        bounds, ends = states.errors + rest.bound(room), states.errors + rest.reached(room)
        best = int(np.argmin(ends))
        alive = bounds < ends[best] - self.rounding
        alive[best] = True  # the best end found so far is always among the states
        states, bounds = states.at(np.flatnonzero(alive)), bounds[alive]
        kept = _undominated(states)
        states, bounds = states.at(kept), bounds[kept]
        if len(kept) <= self.most_states:
            return states
        return self._narrowed(states, bounds, rest)

    def _narrowed(self, states: _States, bounds: Floats, rest: _Relaxation) -> _States:
        """The `most_states` states of least bound, and the one of the best end."""
        order = np.argsort(bounds, kind="stable")
        ends = states.errors + rest.reached((self.room - states.costs).astype(np.float64))
        best = int(np.argmin(ends))
        let_go = order[self.most_states :]
        self.dropped = min(self.dropped, float(bounds[let_go[0]]))
        return states.at(np.sort(np.union1d(order[: self.most_states], [best])))


def _extended(states: _States, item: _Item) -> _States:
    """Every state with every choice of the next item."""
    choices, count = len(item.costs), len(states.costs)
    return _States(
        (states.costs[:, None] + item.costs).ravel(),
        (states.errors[:, None] + item.errors).ravel(),
        np.repeat(np.arange(count, dtype=np.int32), choices),
        np.tile(np.arange(choices, dtype=np.int16), count),
    )


def _undominated(states: _States) -> Ints:
    """Positions, by rising cost, of states that no other one beats in cost and error."""
    order = np.lexsort((states.errors, states.costs))
    errors = states.errors[order]
    before = np.concatenate(([math.inf], np.minimum.accumulate(errors)[:-1]))
    return order[errors < before]
