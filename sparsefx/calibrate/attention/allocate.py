"""One budget spread over many items, each with a few choices of (benefit, cost).

    minimise sum_i cost[i, c_i]   where   sum_i benefit[i, c_i] >= least           (`reach`)
    maximise sum_i benefit[i, c_i]   where   sum_i cost[i, c_i] <= most            (`within`)

Of each item only the lower convex hull of its choices is walked, all items in order of their
marginal cost, cost gained per benefit gained. Wherever that walk stops by itself the result is
optimal (it minimises cost - mu * benefit for some mu); between two stops, the one step too many is
replaced by the best single change, so the result is off by less than one step of one item.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Step:
    """One item goes on to its next choice on the hull."""

    slope: float
    item: int
    choice: int
    benefit: float
    cost: float


def reach(benefit: Tensor, cost: Tensor, least: float) -> Tensor:
    """The choice of each item, int64 [items], of least cost whose benefit sums to `least`.

    benefit, cost: [items, choices]; choice 0 is where an item starts. If no choices reach `least`,
    each item's largest benefit is taken.
    """
    benefit, cost = benefit.double().cpu(), cost.double().cpu()
    chosen = torch.zeros(benefit.shape[0], dtype=torch.int64)
    total = float(benefit[:, 0].sum())
    for step in _steps(benefit, cost):
        if total >= least:
            break
        if total + step.benefit >= least:
            gain, price = _changes(benefit, chosen), _changes(cost, chosen)
            price = price.masked_fill(total + gain < least, float("inf"))
            _change(chosen, price.argmin(), benefit.shape[1])
            break
        total += step.benefit
        chosen[step.item] = step.choice
    return chosen


def within(benefit: Tensor, cost: Tensor, most: float) -> Tensor:
    """The choice of each item, int64 [items], of largest benefit whose cost sums to at most `most`.

    benefit, cost: [items, choices]; choice 0 is where an item starts, and is taken if nothing else
    stays within `most`.
    """
    benefit, cost = benefit.double().cpu(), cost.double().cpu()
    chosen = torch.zeros(benefit.shape[0], dtype=torch.int64)
    total = float(cost[:, 0].sum())
    for step in _steps(benefit, cost):
        if total + step.cost > most:
            break
        total += step.cost
        chosen[step.item] = step.choice
    gain, price = _changes(benefit, chosen), _changes(cost, chosen)
    gain = gain.masked_fill(total + price > most, 0)
    if gain.numel() and gain.max() > 0:
        _change(chosen, gain.argmax(), benefit.shape[1])
    return chosen


def _steps(benefit: Tensor, cost: Tensor) -> list[_Step]:
    """Every item's hull as steps, cheapest first; ties in the order of the items."""
    steps = [
        step
        for item in range(benefit.shape[0])
        for step in _hull(item, benefit[item].tolist(), cost[item].tolist())
    ]
    return sorted(steps, key=lambda step: step.slope)  # stable: an item's steps stay in order


def _hull(item: int, benefit: list[float], cost: list[float]) -> list[_Step]:
    """The lower convex hull of an item's choices from choice 0 on, as steps of rising slope."""
    points = sorted(range(len(benefit)), key=lambda choice: (benefit[choice], cost[choice]))
    hull = [0]

    def slope(start: int, end: int) -> float:
        return (cost[end] - cost[start]) / (benefit[end] - benefit[start])

    for choice in points:
        if benefit[choice] <= benefit[hull[-1]]:
            continue
        while len(hull) > 1 and slope(hull[-2], choice) <= slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return [
        _Step(slope(a, b), item, b, benefit[b] - benefit[a], cost[b] - cost[a])
        for a, b in itertools.pairwise(hull)
    ]


def _changes(table: Tensor, chosen: Tensor) -> Tensor:
    """What each single change of choice would add to the sum, [items, choices]."""
    return table - table.gather(1, chosen[:, None])


def _change(chosen: Tensor, flat: Tensor, choices: int) -> None:
    chosen[int(flat) // choices] = int(flat) % choices
