"""solve(): one weight, its pattern and what is known of its input -> the pruned weight."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsefx.calibrate.statistics import Gram, Moments, SquareSum, Statistic
from sparsefx.criteria import Criterion, DSnoT, Magnitude, Random, Reconstruct, SparseGPT, Wanda
from sparsefx.errors import MissingStatistics, NonFiniteStatistics
from sparsefx.patterns import NM, Pattern
from sparsefx.prune import sparsegpt
from sparsefx.prune.dsnot import swap
from sparsefx.prune.output import output_error as output_error
from sparsefx.prune.output import row_errors
from sparsefx.prune.reconstruct import reconstruct
from sparsefx.prune.rounding import Grid
from sparsefx.prune.wanda import keep_by_row, wanda_scores
from sparsefx.quantise import rounded

Statistics = Mapping[str, Statistic]


@dataclass(frozen=True)
class Solved:
    """A pruned weight.

    weight: [out, in] float32, 0 where pruned; where the criterion changes no weight that stays
    (`criterion.updates`), the rest is the given weight rounded to float32. Of codes it is code *
    scale in the given weight's dtype, which may be 0. keep: bool [out, in].
    """

    weight: Tensor
    keep: Tensor


def solve(weight: Tensor, pattern: Pattern, statistics: Statistics) -> Solved:
    """Prunes `weight` [out, in], any float dtype, finite, not changed, by the pattern's criterion.

    Then rounds what stays to the pattern's codes: to the nearest, or, where a gram was asked for,
    so that later columns make up for it.

    statistics: of the layer's input, by name, at least those in `pattern.criterion.needs`, on the
    weight's device; the pattern fits (`misfit` is None). Memory: a few times the weight and, where
    a gram is asked for, three times that. Raises MissingStatistics, NonFiniteStatistics,
    SingularHessian.
    """
    solved = _pruned(weight.detach().float(), pattern, statistics)
    if not pattern.values:
        return solved
    return Solved(_coded(weight.detach(), solved, pattern, statistics), solved.keep)


def _coded(weight: Tensor, solved: Solved, pattern: Pattern, statistics: Statistics) -> Tensor:
    """The solution as codes * scales of the dtype of `weight`, float32."""
    kept = solved.weight.to(weight.dtype)
    tile = pattern.tile(weight.shape[1])
    criterion = pattern.criterion
    options = compensating(criterion)
    if options is None:
        return rounded(kept, pattern.values, tile).float()
    # Least squares has arrived where rounding moves away from; other updates are made once more.
    start = solved.weight if isinstance(criterion, Reconstruct) else weight.float()
    grid = Grid.fitted(kept, pattern.values, tile)
    return sparsegpt.update(start, solved.keep, _gram(statistics, criterion), options, grid)


def compensating(criterion: Criterion) -> SparseGPT | None:
    """How later columns make up for the rounding of earlier ones; None where none do."""
    match criterion:
        case SparseGPT():
            return criterion
        case DSnoT(start=start):
            return compensating(start)
        case Reconstruct():
            return SparseGPT()
        case _:
            return None


def _pruned(dense: Tensor, pattern: Pattern, statistics: Statistics) -> Solved:
    criterion = pattern.criterion
    match criterion:
        case Magnitude() | Random():
            return _masked(dense, pattern.keep(criterion.scores(dense)))
        case Wanda():
            scores = wanda_scores(dense, _norms(statistics, criterion))
            return _masked(dense, keep_by_row(scores, pattern))
        case SparseGPT():
            gram = _gram(statistics, criterion)
            return Solved(*sparsegpt.prune_and_update(dense, pattern, gram, criterion))
        case DSnoT():
            return _refine(dense, pattern, criterion, statistics)
        case Reconstruct():
            start = _pruned(dense, replace(pattern, criterion=criterion.start), statistics)
            gram = _gram(statistics, criterion)
            found = reconstruct(dense, start.keep, gram, criterion.damp, start.weight)
            return Solved(found, start.keep)


def _masked(dense: Tensor, keep: Tensor) -> Solved:
    return Solved(torch.where(keep, dense, 0), keep)


def _refine(dense: Tensor, pattern: Pattern, criterion: DSnoT, statistics: Statistics) -> Solved:
    """The start's mask after swaps; weights that the start updates are updated for the new mask."""
    start = _pruned(dense, replace(pattern, criterion=criterion.start), statistics)
    moments = _moments(statistics, criterion)
    gram = _gram(statistics, criterion) if "gram" in criterion.needs else None
    group = pattern.m if isinstance(pattern, NM) else 0
    guard = gram if criterion.guard else None
    keep = swap(dense, start.keep, criterion, group, moments, guard)
    swapped = _masked(dense, keep)
    if isinstance(criterion.start, SparseGPT) and gram is not None:
        swapped = Solved(sparsegpt.update(dense, keep, gram, criterion.start), keep)
    if guard is None:
        return swapped
    before, after = (row_errors(dense - found.weight, guard) for found in (start, swapped))
    better = (after < before)[:, None]
    return Solved(
        torch.where(better, swapped.weight, start.weight), torch.where(better, keep, start.keep)
    )


def _norms(statistics: Statistics, criterion: object) -> Tensor:
    """L2 norms of the input features, from whichever statistic holds them."""
    for found in statistics.values():
        if isinstance(found, SquareSum | Gram):
            return _finite(found.norms, "squares")
    raise MissingStatistics(what=criterion, missing="squares")


def _gram(statistics: Statistics, criterion: object) -> Tensor:
    found = statistics.get("gram")
    if not isinstance(found, Gram):
        raise MissingStatistics(what=criterion, missing="gram")
    return _finite(found.gram, "gram")


def _moments(statistics: Statistics, criterion: object) -> Moments:
    found = statistics.get("moments")
    if not isinstance(found, Moments):
        raise MissingStatistics(what=criterion, missing="moments")
    _finite(found.sums + found.squares, "moments")
    return found


def _finite(values: Tensor, statistic: str) -> Tensor:
    if not values.isfinite().all():
        raise NonFiniteStatistics(statistic=statistic, name="a layer")
    return values
