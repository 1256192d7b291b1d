"""reconstruct() finds the least squares solution on the kept weights, and never makes it worse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsefx.criteria import SparseGPT, Wanda
from sparsefx.patterns import NM, Block, Columns, Pattern, Unstructured
from sparsefx.prune.reconstruct import reconstruct
from sparsefx.prune.solve import solve
from tests.layer_inputs import correlated, observed, squared_errors, weight_of


def direct(weight: Tensor, keep: Tensor, gram: Tensor, damp: float) -> Tensor:
    """Row by row: H[k, k] w[k] = (H W)[k], in float64."""
    hessian = gram.double() + damp * gram.double().diagonal().mean() * torch.eye(len(gram))
    target = weight.double() @ hessian
    solution = torch.zeros_like(target)
    for row, kept in enumerate(keep):
        found = torch.linalg.solve(hessian[kept][:, kept], target[row, kept])
        solution[row, kept] = found
    return solution


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5), NM(2, 4), Block(8, 8, 0.5), Columns(0.5)], ids=str
)
@pytest.mark.parametrize("damp", [0.01, 1.0])
def test_it_is_the_least_squares_solution(pattern: Pattern, damp: float) -> None:
    x, weight = correlated(400, 64), weight_of(24, 64)
    gram, keep = x.T @ x, pattern.keep(weight.abs())
    found = reconstruct(weight, keep, gram, damp, tolerance=1e-6)
    assert not found[~keep].any()
    torch.testing.assert_close(found.double(), direct(weight, keep, gram, damp), rtol=0, atol=1e-3)
    coarse = squared_errors(x, weight, reconstruct(weight, keep, gram, damp))
    fine = squared_errors(x, weight, direct(weight, keep, gram, damp))
    assert coarse.sum() <= 1.01 * fine.sum()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 60),
    st.floats(0, 0.99),
    st.sampled_from([0.0, 1e-4, 0.01, 1.0]),
    st.integers(0, 2**31),
)
def test_no_row_gets_worse(
    out: int, width: int, rows: int, sparsity: float, damp: float, seed: int
) -> None:
    x, weight = correlated(rows, width, seed), weight_of(out, width, seed)
    keep = Unstructured(sparsity).keep(weight.abs())
    found = reconstruct(weight, keep, x.T @ x, damp)
    assert found.isfinite().all()
    masked = squared_errors(x, weight, torch.where(keep, weight, 0))
    slack = 1e-6 * squared_errors(x, weight, torch.zeros_like(weight)).sum()  # float32's X^T X
    assert (squared_errors(x, weight, found) <= masked + slack).all()


def test_what_sparsegpt_found_gets_better_on_the_same_mask() -> None:
    x, weight = correlated(600, 96), weight_of(32, 96)
    statistics = observed(x, "gram")
    pruned = solve(weight, NM(2, 4, SparseGPT()), statistics)
    found = reconstruct(weight, pruned.keep, x.T @ x, start=pruned.weight)
    before, after = (squared_errors(x, weight, w) for w in (pruned.weight, found))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.95 * before.sum()


def test_rows_that_would_get_worse_keep_their_start() -> None:
    x, weight = correlated(600, 32), weight_of(8, 32)
    keep = NM(2, 4).keep(weight.abs())
    best = reconstruct(weight, keep, x.T @ x, 1e-6, tolerance=1e-6)
    # Damping this strong pulls the weights back towards the dense ones.
    assert torch.equal(reconstruct(weight, keep, x.T @ x, 1e3, start=best), best)


def test_dense_rows_stay_and_empty_rows_stay_empty() -> None:
    x, weight = correlated(100, 16), weight_of(4, 16)
    keep = torch.ones(4, 16, dtype=torch.bool)
    keep[1] = False
    found = reconstruct(weight, keep, x.T @ x)
    assert torch.equal(found[[0, 2, 3]], weight[[0, 2, 3]])
    assert not found[1].any()


def test_dead_inputs_and_no_inputs_keep_the_given_weights() -> None:
    x, weight = correlated(100, 16), weight_of(4, 16)
    x[:, 5] = 0
    keep = solve(weight, NM(2, 4, Wanda()), observed(x)).keep
    keep[:, 5] = True
    for damp in (0.0, 0.01):
        found = reconstruct(weight, keep, x.T @ x, damp)
        assert torch.equal(found[:, 5], weight[:, 5])
        nothing = reconstruct(weight, keep, torch.zeros(16, 16), damp)
        assert torch.equal(nothing, torch.where(keep, weight, 0))
