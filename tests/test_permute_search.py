"""find_order(): never worse than the given order, exact where that can be known, deterministic."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from sparsefx.errors import ShapeMismatch
from sparsefx.patterns import NM
from sparsefx.prune.permute.search import find_order, kept


def random_scores(rows: int, channels: int, seed: int = 0) -> Tensor:
    """Magnitudes of Gaussian weights times a norm of each channel, as Wanda ranks them."""
    generator = torch.Generator().manual_seed(seed)
    norms = torch.randn(channels, generator=generator).exp()
    return torch.randn(rows, channels, generator=generator).abs() * norms


def meaning(scores: list[Tensor], order: Tensor, n: int, m: int) -> float:
    """What the mask of the pattern keeps, in float64."""
    total = 0.0
    for matrix in scores:
        put = matrix.double()[:, order]
        total += float((put * NM(n, m).keep(put)).sum())
    return total


def best_of_all(matrix: Tensor) -> float:
    """The most that 2:4 can keep of eight channels: all 35 ways to part them in two."""
    orders = [
        torch.tensor([0, *three, *(c for c in range(1, 8) if c not in three)])
        for three in combinations(range(1, 8), 3)
    ]
    return max(meaning([matrix], order, 2, 4) for order in orders)


def planted(rows: int, groups: int) -> Tensor:
    """Scores of which 2:4 loses nothing: two of each four are zero."""
    generator = torch.Generator().manual_seed(3)
    full = torch.rand(rows, groups * 4, generator=generator) + 0.5
    return full * NM(2, 4).keep(torch.rand(full.shape, generator=generator))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (1, 2)])
@pytest.mark.parametrize("rows", [(48,), (16, 40)])
def test_keeps_more_of_random_weights(n: int, m: int, rows: tuple[int, ...]) -> None:
    scores = [random_scores(count, 64, seed) for seed, count in enumerate(rows)]
    found = find_order(scores, n, m, work=20_000_000)
    given = torch.arange(64)
    assert torch.equal(found.order.sort().values, given)
    assert found.after == pytest.approx(meaning(scores, found.order, n, m), rel=1e-6)
    assert found.before == pytest.approx(meaning(scores, given, n, m), rel=1e-6)
    assert found.after > found.before and found.gain > 0.01


@pytest.mark.parametrize("seed", range(12))
def test_finds_the_best_of_all_orders_of_eight_channels(seed: int) -> None:
    matrix = random_scores(24, 8, seed)
    found = find_order([matrix], 2, 4)
    assert found.after == pytest.approx(best_of_all(matrix), rel=1e-5)


@pytest.mark.parametrize("work", [0, 1, 10_000, 1_000_000])
@pytest.mark.parametrize("seed", range(3))
def test_is_never_worse_however_little_it_may_work(work: int, seed: int) -> None:
    scores = [random_scores(20, 48, seed)]
    found = find_order(scores, 2, 4, work=work, seed=seed)
    assert found.after >= found.before
    assert torch.equal(found.order.sort().values, torch.arange(48))


def test_more_work_does_not_keep_less() -> None:
    scores = [random_scores(64, 128)]
    gains = [find_order(scores, 2, 4, work=work).gain for work in (10**5, 10**6, 5 * 10**6)]
    assert gains == sorted(gains) and gains[0] < gains[-1]


def test_leaves_alone_what_loses_nothing() -> None:
    found = find_order([planted(32, 16)], 2, 4, work=1_000_000)
    assert torch.equal(found.order, torch.arange(64)) and found.gain == 0


def test_undoes_most_of_a_shuffle_of_the_best_order() -> None:
    best = planted(64, 6)
    shuffle = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    found = find_order([best[:, shuffle]], 2, 4)
    lost_before = float(best.sum()) - found.before
    assert float(best.sum()) - found.after < 0.05 * lost_before


def test_zeros_keep_their_order() -> None:
    found = find_order([torch.zeros(4, 16)], 2, 4)
    assert torch.equal(found.order, torch.arange(16)) and found.gain == 0


def test_ties_and_a_single_group() -> None:
    assert find_order([torch.ones(4, 16)], 2, 4, work=10**5).gain == 0
    assert torch.equal(find_order([torch.rand(4, 4)], 2, 4).order, torch.arange(4))


def test_is_deterministic_and_takes_any_float_dtype() -> None:
    scores = [random_scores(32, 64)]
    first, second = (find_order(scores, 2, 4, work=3_000_000, seed=7) for _ in range(2))
    assert torch.equal(first.order, second.order) and first.after == second.after
    assert find_order([scores[0].bfloat16()], 2, 4, work=3_000_000).gain > 0


def test_kept_counts_all_matrices() -> None:
    matrix = torch.tensor([[4.0, 3.0, 2.0, 1.0, 1.0, 2.0, 3.0, 4.0]])
    assert kept([matrix], torch.arange(8), 2, 4) == 14
    assert kept([matrix, matrix], torch.tensor([0, 7, 1, 6, 2, 5, 3, 4]), 2, 4) == 2 * (8 + 4)


@pytest.mark.parametrize(
    "scores",
    [[], [torch.rand(4, 8), torch.rand(4, 12)], [torch.rand(4, 10)], [torch.rand(8)]],
    ids=["none", "other widths", "not a multiple", "a vector"],
)
def test_refuses_scores_that_have_no_order(scores: list[Tensor]) -> None:
    with pytest.raises(ShapeMismatch):
        find_order(scores, 2, 4)
