"""Allocation of one budget against brute force, and the law of factor over sparsity."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from sparsefx.attention.spec import SkipSoftmax
from sparsefx.calibrate.attention.allocate import reach, within
from sparsefx.calibrate.attention.law import at_factor, fit
from sparsefx.calibrate.attention.skips import SkipStatistics
from sparsefx.calibrate.attention.solve import SparsityOutOfReach, solve

# TensorRT-LLM's published factors of Qwen3-30B-A3B-Instruct-2507 (its tech blog 16).
SPARSITIES = torch.arange(1, 10) / 10
PUBLISHED = {
    "prefill": (18.76, 44.37, 104.97, 248.40, 587.18, 1390.63, 3293.04, 7799.91, 18471.56),
    "decode": (0.32, 0.86, 2.30, 6.17, 16.52, 44.26, 118.62, 317.99, 852.20),
}


def random_tables(seed: int, items: int = 4, choices: int = 5) -> tuple[Tensor, Tensor]:
    """Benefits that rise, and costs that mostly do, neither convex; choice 0 is (0, 0)."""
    generator = torch.Generator().manual_seed(seed)
    benefit = torch.randint(0, 9, (items, choices), generator=generator).cumsum(1).double()
    cost = torch.rand(items, choices, generator=generator, dtype=torch.float64).cumsum(1).square()
    return benefit - benefit[:, :1], cost - cost[:, :1]


def best(benefit: Tensor, cost: Tensor, least: float, most: float) -> tuple[float, float]:
    """By trying everything: least cost that reaches `least`, largest benefit within `most`."""
    rows = range(benefit.shape[0])
    totals = [
        (
            sum(float(benefit[i, c]) for i, c in zip(rows, choice, strict=True)),
            sum(float(cost[i, c]) for i, c in zip(rows, choice, strict=True)),
        )
        for choice in itertools.product(range(benefit.shape[1]), repeat=len(rows))
    ]
    cheapest = min(price for gain, price in totals if gain >= least)
    return cheapest, max(gain for gain, price in totals if price <= most + 1e-12)


def taken(table: Tensor, chosen: Tensor) -> float:
    return float(table.gather(1, chosen[:, None]).sum())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 1.0])
def test_allocation_is_best_but_for_one_step(seed: int, share: float) -> None:
    benefit, cost = random_tables(seed)
    least, most = share * float(benefit.amax(1).sum()), share * float(cost.amax(1).sum())
    cheapest, largest = best(benefit, cost, least, most)
    reached, held = reach(benefit, cost, least), within(benefit, cost, most)
    assert taken(benefit, reached) >= least
    assert taken(cost, held) <= most
    assert cheapest - 1e-9 <= taken(cost, reached) <= cheapest + float(cost.amax(1).max())
    assert largest >= taken(benefit, held) >= largest - float(benefit.amax(1).max())
    # What it stops at is the cheapest way to get that much, or that one step cheaper.
    exact, _ = best(benefit, cost, taken(benefit, reached), most)
    assert taken(cost, reached) <= exact + float((cost[:, 1:] - cost[:, :-1]).max())


@pytest.mark.parametrize("seed", range(6))
def test_allocation_is_exact_where_costs_are_convex_and_steps_are_equal(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.rand(4, 4, generator=generator, dtype=torch.float64).sort(1).values
    cost = torch.cat((torch.zeros(4, 1, dtype=torch.float64), slopes.cumsum(1)), 1)
    benefit = torch.arange(5, dtype=torch.float64).expand(4, 5)
    for least in range(17):
        cheapest, _ = best(benefit, cost, least, 0)
        assert taken(cost, reach(benefit, cost, least)) == pytest.approx(cheapest)


def test_a_budget_beyond_reach_takes_everything_and_a_tiny_one_nothing() -> None:
    benefit, cost = random_tables(0)
    assert taken(benefit, reach(benefit, cost, 1e9)) == float(benefit.amax(1).sum())
    assert taken(cost, within(benefit, cost, 0.0)) == 0
    assert not reach(benefit, cost, 0.0).any()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_law_finds_the_published_factors(phase: str) -> None:
    factors = torch.tensor(PUBLISHED[phase], dtype=torch.float64)
    law = fit(factors, SPARSITIES)
    assert law is not None and law.r2 > 0.99999
    a, b = {"prefill": (7.9185, 8.6152), "decode": (0.1196, 9.8573)}[phase]
    assert law.a == pytest.approx(a, rel=0.01) and law.b == pytest.approx(b, rel=0.002)
    for sparsity, factor in zip(SPARSITIES.tolist(), factors.tolist(), strict=True):
        # They are rounded to 0.01, which is 1.6 % of the smallest.
        assert law.factor(sparsity) == pytest.approx(factor, rel=0.002, abs=0.0055)


def test_the_law_reads_points_between_a_tenth_and_nine_tenths_only() -> None:
    sparsity = torch.tensor([0.0, 0.05, 0.2, 0.4, 0.6, 0.95, 1.0])
    factors = 3 * (5 * sparsity).exp()
    factors[[0, 1, 5, 6]] = 77.0
    law = fit(factors, sparsity)
    assert law is not None and law.r2 == pytest.approx(1)
    assert (law.a, law.b) == (pytest.approx(3, rel=1e-5), pytest.approx(5, rel=1e-5))
    assert fit(factors[:4], sparsity[:4]) is None


def test_tables_are_read_between_trials_on_the_log_of_the_factor() -> None:
    factors, table = torch.tensor([1.0, 100.0]), torch.tensor([[2.0, 6.0]]).double().expand(6, 2)
    wanted = torch.tensor([0.0, 0.5, 1.0, 10.0, 100.0, 1e6])
    assert at_factor(factors, table, wanted).tolist() == pytest.approx([0, 1, 2, 4, 6, 6])


def made_up(
    heads: int, seed: int, per: str = "head", **goal: float
) -> tuple[SkipSoftmax, SkipStatistics]:
    """Statistics as if measured: skipping grows with the factor, its error much faster."""
    generator = torch.Generator().manual_seed(seed)
    spec = SkipSoftmax(per=per, **goal)
    found = SkipStatistics.empty(spec, heads, heads // 2, (64, 64))
    found._reach(1024)
    found.keys = (1024, 1024)
    for tables in (found.prefill, found.decode):
        share = (tables.factors.double().log() / math.log(1024)).clamp(min=0) * 0.95
        delay = torch.rand(heads // tables.together, 1, generator=generator).double() * 0.3
        delay = delay.repeat_interleave(tables.together, 0)
        tables.visible += 1000
        tables.skipped += (1000 * (share - delay).clamp(min=0)).round()
        tables.norm += 50.0
        tables.rows += 640
        tables.error += (share**4 + torch.rand(heads, 1, generator=generator) * share**6) * 10
        tables.lost += 600 * share**3
    return spec, found


@pytest.mark.parametrize("per", ["head", "model"])
def test_a_sparsity_is_met_over_the_whole_model(per: str) -> None:
    spec, first = made_up(4, 0, per, sparsity=0.4)
    _, second = made_up(8, 1, per, sparsity=0.4)
    found = solve(spec, {"first": first, "second": second})
    for phase in (0, 1):
        skipped = sum(each.skipped[phase] * each.heads for each in found.values()) / 12
        # One head of 12 may go one trial further; the law of `model` is a fit.
        assert skipped == pytest.approx(0.4, abs=0.02 if per == "head" else 0.05)
    assert found["first"].keys == (1024, 1024) and found["first"].heads == 4
    assert all(value is not None and value > 0.5 for value in found["first"].r2)
    if per == "model":
        assert len({*found["first"].prefill, *found["second"].prefill}) == 1
    # Heads of one KV head decide together.
    assert found["first"].decode[0] == found["first"].decode[1]


@pytest.mark.parametrize("phase", [0, 1])
def test_heads_of_their_own_cost_less_than_one_factor(phase: int) -> None:
    spec, statistics = made_up(64, 2, "model", sparsity=0.4)
    single = solve(spec, {"only": statistics})["only"]
    spec = SkipSoftmax(sparsity=single.skipped[phase])
    own = solve(spec, {"only": statistics})["only"]
    assert own.skipped[phase] >= single.skipped[phase]
    assert own.error[phase] < single.error[phase]


@pytest.mark.parametrize("per", ["head", "model"])
def test_an_error_bounds_every_layer(per: str) -> None:
    spec, first = made_up(4, 3, per, error=0.1)
    _, second = made_up(8, 4, per, error=0.1)
    found = solve(spec, {"first": first, "second": second})
    for each in found.values():
        assert all(error <= 0.1 + 1e-9 for error in each.error)
        assert all(skipped > 0.05 for skipped in each.skipped)
    if per == "head":  # each layer goes as far as it may
        assert all(error > 0.08 for each in found.values() for error in each.error)


def test_given_factors_are_taken_as_they_are() -> None:
    spec = SkipSoftmax(scale_factor=(12.0, 0.5))
    statistics = SkipStatistics.empty(spec, 4, 2, (64, 64))
    for tables, skipped in ((statistics.prefill, 30.0), (statistics.decode, 7.0)):
        tables.visible += 100
        tables.norm += 4
        tables.rows += 10
        tables.skipped += skipped
        tables.error += 0.01
    found = solve(spec, {"only": statistics})["only"]
    assert (found.prefill, found.decode) == ((12.0,) * 4, (0.5,) * 4)
    assert found.skipped == (pytest.approx(0.3), pytest.approx(0.07))
    assert found.error == (pytest.approx(math.sqrt(0.01 / 4)),) * 2
    assert found.r2 == (None, None)


def test_what_cannot_be_reached_is_said() -> None:
    spec, statistics = made_up(4, 5, sparsity=0.99)
    with pytest.warns(SparsityOutOfReach, match="99% of the tiles"):
        found = solve(spec, {"only": statistics})["only"]
    assert set(found.prefill) == {1024.0}
