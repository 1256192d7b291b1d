"""SparseGPT against its formulas written out in float64: same masks, same weights, same counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsefx.criteria import SparseGPT
from sparsefx.errors import SingularHessian
from sparsefx.patterns import NM, Block, Columns, Pattern, Rows, Unstructured
from sparsefx.prune.solve import solve
from sparsefx.prune.sparsegpt import inverse_factor, prune_and_update, update
from tests.layer_inputs import correlated, observed, squared_errors, weight_of


def gram_of(x: Tensor) -> Tensor:
    return x.T @ x


def reference(
    weight: Tensor, gram: Tensor, pattern: Unstructured | NM, damp: float, block: int
) -> tuple[Tensor, Tensor]:
    """The published algorithm, one column of [out, in] after the other, in float64."""
    w, hessian = weight.double().clone(), gram.double().clone()
    out, width = w.shape
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    hessian += damp * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    keep = torch.ones(out, width, dtype=torch.bool)
    for start in range(0, width, block):
        stop = min(start + block, width)
        if isinstance(pattern, Unstructured):
            scores = w[:, start:stop].square() / u.diagonal()[start:stop].square()
            drop = int(pattern.sparsity * out * stop) - int(pattern.sparsity * out * start)
            order = scores.T.flatten().sort().indices[:drop]  # no ties in these inputs
            keep[order % out, start + order // out] = False
        for j in range(start, stop):
            if isinstance(pattern, NM) and j % pattern.m == 0:
                span = slice(j, j + pattern.m)
                scores = w[:, span].square() / u.diagonal()[span].square()
                order = scores.sort(dim=1).indices[:, : pattern.m - pattern.n]
                keep[:, span] = torch.ones_like(scores, dtype=torch.bool).scatter(1, order, False)
            error = torch.where(keep[:, j], 0, w[:, j]) / u[j, j]
            w[:, j:] -= torch.outer(error, u[j, j:])
    return torch.where(keep, w, 0), keep


@pytest.mark.parametrize("block", [128, 24])
@pytest.mark.parametrize(
    "pattern",
    [Unstructured(0.5), Unstructured(0.77), NM(2, 4), NM(4, 8), NM(5, 12), NM(3, 16)],
    ids=str,
)
def test_it_is_the_published_algorithm(pattern: Unstructured | NM, block: int) -> None:
    x, weight = correlated(600, 240), weight_of(40, 240)
    step = max(pattern.m, block // pattern.m * pattern.m) if isinstance(pattern, NM) else block
    expected, mask = reference(weight, gram_of(x), pattern, 0.01, step)
    found, keep = prune_and_update(weight, pattern, gram_of(x), SparseGPT(0.01, block))
    same = (keep == mask).all(1)
    # One choice that float32 rounds the other way changes the rest of its row, and no other row,
    # but for the block's count: a swap between two rows.
    assert same.float().mean() >= 0.9
    torch.testing.assert_close(found[same].double(), expected[same], rtol=2e-3, atol=2e-3)
    total = float(squared_errors(x, weight, expected).sum())
    assert float(squared_errors(x, weight, found).sum()) == pytest.approx(total, rel=1e-2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 9),
    st.integers(1, 70),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 80),
    st.integers(0, 2**31),
)
def test_unstructured_counts_are_exact_whatever_the_ties(
    out: int, width: int, sparsity: float, block: int, seed: int
) -> None:
    weight = weight_of(out, width, seed).round()  # many equal ones, many zeros
    x = correlated(3, width, seed)  # fewer rows than features: X^T X has no inverse
    found, keep = prune_and_update(
        weight, Unstructured(sparsity), gram_of(x), SparseGPT(block=block)
    )
    assert int((~keep).sum()) == int(sparsity * out * width)
    assert found.isfinite().all()
    assert not found[~keep].any()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(2, 40).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(0, 2**31),
)
def test_every_group_keeps_exactly_n(
    nm: tuple[int, int], out: int, groups: int, block: int, seed: int
) -> None:
    weight = weight_of(out, groups * nm[1], seed).round()
    x = correlated(50, groups * nm[1], seed)
    found, keep = prune_and_update(weight, NM(*nm), gram_of(x), SparseGPT(block=block))
    assert (keep.view(out, groups, nm[1]).sum(-1) == nm[0]).all()
    assert found.isfinite().all() and not found[~keep].any()


@pytest.mark.parametrize("pattern", [Block(4, 8, 0.5), Rows(0.25), Columns(0.5)], ids=str)
def test_parts_are_chosen_by_their_summed_error_and_the_rest_makes_up_for_them(
    pattern: Pattern,
) -> None:
    x, weight = correlated(400, 64), weight_of(32, 64)
    found, keep = prune_and_update(weight, pattern, gram_of(x), SparseGPT())
    u = inverse_factor(gram_of(x), 0.01)
    assert torch.equal(keep, pattern.keep((weight / u.diagonal()).square()))
    assert torch.equal(found, update(weight, keep, gram_of(x), SparseGPT()))
    masked = squared_errors(x, weight, torch.where(keep, weight, 0))
    assert (squared_errors(x, weight, found) <= masked * 1.0001).all()


def test_a_given_mask_is_updated_for() -> None:
    x, weight = correlated(400, 96), weight_of(16, 96)
    found, keep = prune_and_update(weight, Unstructured(0.5), gram_of(x), SparseGPT(block=32))
    again = update(weight, keep, gram_of(x), SparseGPT(block=32))
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-4)


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    gram = gram_of(correlated(500, 200))  # wider than what is inverted in one piece
    u = inverse_factor(gram, 0.01).double()
    damped = gram.double() / gram.double().diagonal().mean() + 0.01 * torch.eye(200)
    assert torch.equal(u, u.triu())
    identity = torch.eye(200, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u @ damped, identity, rtol=0, atol=2e-3)


def test_inputs_that_are_always_zero_lose_their_column_and_disturb_no_other() -> None:
    x, weight = correlated(400, 32), weight_of(8, 32)
    x[:, [3, 17]] = 0
    found, keep = prune_and_update(weight, NM(2, 4), gram_of(x), SparseGPT())
    assert not found[:, [3, 17]].any()
    assert found[:, 16].any() and found[:, 2].any()
    nothing, keep = prune_and_update(weight, Unstructured(0.5), torch.zeros(32, 32), SparseGPT())
    assert not nothing.any() and int((~keep).sum()) == 128


def test_damping_grows_until_there_is_a_factor_and_then_gives_up() -> None:
    # One feature many times over: its factor needs damping that the number format can see.
    copies = gram_of(correlated(100, 1).expand(100, 8))
    with pytest.raises(SingularHessian, match="even with 1e-17 times its mean"):
        inverse_factor(copies, 1e-20)
    assert inverse_factor(copies, 1e-12).isfinite().all()  # in float64
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05]))  # no sum of squares
    assert inverse_factor(indefinite, 0.01).isfinite().all()
    with pytest.raises(SingularHessian, match="even with 10 times its mean"):
        inverse_factor(torch.tensor([[1.0, 20.0], [20.0, 1.0]]), 0.01)


def test_neither_weight_nor_gram_is_written_to() -> None:
    x, weight = correlated(100, 16), weight_of(4, 16)
    gram = gram_of(x)
    before = weight.clone(), gram.clone()
    prune_and_update(weight, NM(2, 4), gram, SparseGPT())
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])


def test_the_scale_of_the_inputs_does_not_matter() -> None:
    x, weight = correlated(300, 48), weight_of(12, 48)
    masks = [
        solve(weight, NM(2, 4, SparseGPT()), observed(x * scale, "gram")).keep
        for scale in (1.0, 2.0**-30, 2.0**30)
    ]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
