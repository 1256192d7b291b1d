"""Budgets handed out in proportion to a score, with caps: uniform, ER, ERK, score-proportional.

    kept_l = floor_l + min(epsilon score_l, cap_l - floor_l)      sum_l kept_l = budget

The left side rises with epsilon and is linear between the points where a layer fills up, so that
epsilon is found exactly; handing out the rest again and again among layers that are not full ends
there too.

    ER, ERK        floor 0, cap numel, score = density score * numel
    zeroth order   floor (1 - max_sparsity) numel, cap numel, score measured
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sparsefx.errors import ImpossibleBudget, InvalidAllocation
from sparsefx.prune.allocation.layers import Layer, check_sparsity, total

Floats = NDArray[np.float64]

# Scores this much smaller than the largest count as 0: cap / score would leave the range of floats.
_NEGLIGIBLE = 1e-100


def uniform(layers: Sequence[Layer], sparsity: float) -> dict[str, float]:
    """`sparsity` for every layer, by name. Raises InvalidAllocation outside [0, 1)."""
    check_sparsity(sparsity)
    return {layer.name: float(sparsity) for layer in layers}


def er(layers: Sequence[Layer], sparsity: float) -> dict[str, float]:
    """Sparsity of each layer by name: density = epsilon (out + in) / (out * in), at most 1.

    The mean weighted by parameters is `sparsity` (arXiv 1707.04780). Kernel sizes of convolutions
    do not count. Raises InvalidAllocation for a sparsity outside [0, 1).
    """
    scores = [layer.parts * sum(layer.shape[:2]) * math.prod(layer.shape[2:]) for layer in layers]
    return _by_score(layers, scores, sparsity, 0.0)


def erk(layers: Sequence[Layer], sparsity: float) -> dict[str, float]:
    """Sparsity of each layer by name: density = epsilon sum(shape) / prod(shape), at most 1.

    The mean weighted by parameters is `sparsity` (arXiv 1911.11134). Raises InvalidAllocation for a
    sparsity outside [0, 1).
    """
    scores = [layer.parts * sum(layer.shape) for layer in layers]
    return _by_score(layers, scores, sparsity, 0.0)


def by_score(
    layers: Sequence[Layer],
    scores: Mapping[str, float],
    sparsity: float,
    max_sparsity: float,
    per: str = "weight",
) -> dict[str, float]:
    """Sparsity of each layer by name, from a score of importance of each (arXiv 2310.02998).

    Every layer first keeps 1 - max_sparsity of its weights; the rest of the budget is handed out in
    proportion to the scores, those of a full layer to the others. per="block" sums the scores of a
    block, whose layers then share one sparsity. The mean weighted by parameters is `sparsity`.

    Raises ImpossibleBudget if `sparsity` exceeds `max_sparsity`, InvalidAllocation for a score that
    is negative or no number.
    """
    if sparsity > max_sparsity:
        raise ImpossibleBudget(
            rule=f"every layer keeps at least {1 - max_sparsity:.4g} of its weights and a sparsity "
            f"of {sparsity:.4g} leaves {1 - sparsity:.4g} of all",
            remedy=f"Ask for at most {max_sparsity:.4g}, or pass a larger max_sparsity",
        )
    if per == "weight":
        return _by_score(layers, [scores[each.name] for each in layers], sparsity, max_sparsity)
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    members = [[layer for layer in layers if layer.block == block] for block in blocks]
    whole = [Layer(blocks[i], blocks[i], (total(group),)) for i, group in enumerate(members)]
    summed = [math.fsum(scores[layer.name] for layer in group) for group in members]
    shares = _by_score(whole, summed, sparsity, max_sparsity)
    return {layer.name: shares[layer.block] for layer in layers}


def _by_score(
    layers: Sequence[Layer], scores: Sequence[float], sparsity: float, max_sparsity: float
) -> dict[str, float]:
    check_sparsity(sparsity)
    sizes = np.array([layer.numel for layer in layers], dtype=np.float64)
    floors = (1 - max_sparsity) * sizes if max_sparsity else np.zeros_like(sizes)
    _check_scores(layers, scores)
    kept = hand_out(np.array(scores, dtype=np.float64), floors, sizes, (1 - sparsity) * sizes.sum())
    shares = 1 - kept / sizes
    return {layer.name: max(0.0, float(share)) for layer, share in zip(layers, shares, strict=True)}


def _check_scores(layers: Sequence[Layer], scores: Sequence[float]) -> None:
    for layer, score in zip(layers, scores, strict=True):
        if not math.isfinite(score) or score < 0:
            raise InvalidAllocation(
                what=f"the score {score} of {layer.name}",
                rule="scores of importance are finite numbers from 0 on",
                remedy="Look for bad weights or bad calibration inputs",
            )


def hand_out(scores: Floats, floors: Floats, caps: Floats, budget: float) -> Floats:
    """What each of n layers gets of `budget`, float64 [n]: the rule at the top of this module.

    Layers of score 0 get more than their floor only of what all others leave, in proportion to
    their room. `budget` lies between the sums of `floors` and of `caps`.
    """
    room, left = caps - floors, budget - float(floors.sum())
    wanted = scores > _NEGLIGIBLE * scores.max(initial=0.0)
    others = float(room[~wanted].sum())
    filled = float(room[wanted].sum())
    if left >= filled:
        ratio = min(1.0, (left - filled) / others) if others else 0.0
        return floors + np.where(wanted, room, ratio * room)
    given = np.minimum(_epsilon(scores[wanted], room[wanted], left) * scores[wanted], room[wanted])
    kept = floors.copy()
    kept[wanted] += given
    return kept


def _epsilon(scores: Floats, room: Floats, left: float) -> float:
    """epsilon of sum_l min(epsilon score_l, room_l) = left, where 0 <= left < sum(room).

    Up to the i-th layer that fills up, in order of room / score:
    f(epsilon) = sum_{l < i} room_l + epsilon sum_{l >= i} score_l.
    """
    order = np.argsort(room / scores, kind="stable")
    scores, room = scores[order], room[order]
    full = np.concatenate(([0.0], np.cumsum(room)[:-1]))  # given to the layers already full
    rest = np.cumsum(scores[::-1])[::-1]
    reached = full + room / scores * rest  # given when the layer fills up; ascends
    first = min(int(np.searchsorted(reached, left)), len(reached) - 1)
    return float((left - full[first]) / rest[first])
