"""DSnoT against a loop over rows in float64; the guard never lets a row get worse."""

from typing import cast

import pytest
import torch
from torch import Tensor

from sparsefx.calibrate.statistics import Moments
from sparsefx.criteria import DSnoT, Magnitude, SparseGPT, Wanda
from sparsefx.patterns import NM, Unstructured
from sparsefx.prune.dsnot import swap
from sparsefx.prune.solve import solve
from tests.layer_inputs import correlated, observed, squared_errors, weight_of

OUT, WIDTH = 24, 64


def by_rows(
    weight: Tensor, keep: Tensor, x: Tensor, options: DSnoT, group: int, samples: int
) -> Tensor:
    """One row, one swap at a time."""
    w, x = weight.double(), x.double()
    norms, mean = x.square().sum(0).sqrt(), x.sum(0) / samples
    variance = x.var(0, unbiased=False)
    result = keep.clone()
    for row in range(w.shape[0]):
        change, score = w[row] * mean, w[row].abs() * norms
        may_grow = {j for j in range(w.shape[1]) if not keep[row, j]}
        may_prune = {j for j in range(w.shape[1]) if keep[row, j]}
        error = float(change[~keep[row]].sum())
        for _ in range(options.cycles):
            if abs(error) <= options.tolerance:
                break
            sign = 1 if error > 0 else -1
            growing = [j for j in may_grow if sign * change[j] > 0]
            if not growing:
                break
            grown = max(growing, key=lambda j: float(sign * change[j] / variance[j]))
            may_grow.discard(grown)
            if group:
                pruning = [j for j in may_prune if j // group == grown // group]
                if not pruning:
                    continue
            else:
                pruning = [j for j in may_prune if sign * change[j] < 0]
                if not pruning:
                    break
            pruned = min(pruning, key=lambda j: float(score[j]))
            may_prune.discard(pruned)
            result[row, grown], result[row, pruned] = True, False
            error += float(change[pruned] - change[grown])
    return result


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("options", [DSnoT(), DSnoT(cycles=3), DSnoT(tolerance=5.0)], ids=str)
def test_swaps_are_those_of_a_loop_over_rows(options: DSnoT, sparsity: float) -> None:
    x, weight = correlated(300, WIDTH), weight_of(OUT, WIDTH)
    statistics = observed(x, samples=3)
    start = solve(weight, Unstructured(sparsity, Wanda()), statistics).keep
    moments = cast(Moments, statistics["moments"])
    found = swap(weight, start, options, 0, moments, None)
    assert torch.equal(found, by_rows(weight, start, x, options, 0, samples=3))
    assert not torch.equal(found, start)
    assert torch.equal(found.sum(1), start.sum(1))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (5, 16)])
def test_swaps_within_groups_are_those_of_a_loop_over_rows(n: int, m: int) -> None:
    x, weight = correlated(300, WIDTH), weight_of(OUT, WIDTH)
    statistics = observed(x)
    start = solve(weight, NM(n, m, Wanda()), statistics).keep
    moments = cast(Moments, statistics["moments"])
    found = swap(weight, start, DSnoT(), m, moments, None)
    assert torch.equal(found, by_rows(weight, start, x, DSnoT(), m, samples=4))
    assert not torch.equal(found, start)
    assert (found.view(OUT, -1, m).sum(-1) == n).all()


def test_it_lowers_the_error_that_a_row_expects() -> None:
    x, weight = correlated(300, 256), weight_of(OUT, 256)
    statistics = observed(x)
    expected = weight * x.mean(0)
    start, refined = (
        solve(weight, Unstructured(0.5, criterion), statistics).keep
        for criterion in (Wanda(), DSnoT(guard=False))
    )
    before, after = (expected.masked_fill(keep, 0).sum(1).abs() for keep in (start, refined))
    assert after.mean() < 0.3 * before.mean()


@pytest.mark.parametrize("pattern", [Unstructured, lambda _, criterion: NM(2, 4, criterion)])
@pytest.mark.parametrize("start", [Magnitude(), Wanda(), SparseGPT()])
def test_with_its_guard_no_row_gets_worse_and_some_get_better(start, pattern) -> None:  # type: ignore[no-untyped-def]  # parametrised
    x, weight = correlated(300, WIDTH), weight_of(OUT, WIDTH)
    statistics = observed(x)
    before = solve(weight, pattern(0.6, criterion=start), statistics)
    after = solve(weight, pattern(0.6, criterion=DSnoT(start)), statistics)
    errors = [squared_errors(x, weight, found.weight) for found in (before, after)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert (errors[1] < errors[0] * 0.999).any()
    assert torch.equal(after.keep.sum(1), before.keep.sum(1))
    untouched = (after.keep == before.keep).all(1)
    torch.testing.assert_close(after.weight[untouched], before.weight[untouched])


def test_without_its_guard_the_squared_error_can_rise() -> None:
    x, weight = correlated(300, WIDTH), weight_of(OUT, WIDTH)
    statistics = observed(x)
    before = solve(weight, NM(2, 4, Wanda()), statistics)
    loose = solve(weight, NM(2, 4, DSnoT(guard=False)), statistics)
    errors = [squared_errors(x, weight, found.weight) for found in (before, loose)]
    assert (errors[1] > errors[0]).any()


def test_constant_and_dead_inputs_are_no_trouble() -> None:
    x, weight = correlated(50, 16), weight_of(4, 16)
    x[:, 2], x[:, 5], x[:, 6] = 0.0, 3.0, -1.0
    for pattern in (Unstructured(0.5, DSnoT()), NM(2, 4, DSnoT()), NM(2, 4, DSnoT(guard=False))):
        found = solve(weight, pattern, observed(x))
        assert found.weight.isfinite().all()
        assert int(found.keep.sum()) == 32
