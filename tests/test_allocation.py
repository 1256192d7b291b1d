"""Budgets spread over layers: means are exact, caps hold, outliers and costs are as defined."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsefx.allocations import ER, ERK, OWL, GlobalMagnitude, Knapsack, Uniform, ZerothOrder
from sparsefx.errors import (
    ImpossibleBudget,
    InvalidAllocation,
    SparseFXError,
)
from sparsefx.prune.allocation.layers import Layer, share_of
from sparsefx.prune.allocation.owl import LEAST_DENSITY, outlier_share, owl, owl_nm
from sparsefx.prune.allocation.proportional import by_score, er, erk, uniform

LAYERS = (
    Layer("stem", "0", (32, 3, 3, 3)),
    Layer("wide", "0", (300, 100)),
    Layer("taps", "1", (64, 32, 5, 5)),
    Layer("thin", "1", (4, 200)),
    Layer("head", "2", (10, 64)),
)


def mean(layers: tuple[Layer, ...], shares: dict[str, float]) -> float:
    """Weighted by parameters."""
    whole = sum(layer.numel for layer in layers)
    return math.fsum(shares[layer.name] * layer.numel for layer in layers) / whole


def blocks(count: int, sizes: tuple[int, ...] = (96, 32)) -> tuple[Layer, ...]:
    return tuple(
        Layer(f"{block}.{i}", f"{block}", (size, 8))
        for block in range(count)
        for i, size in enumerate(sizes)
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- uniform, ER, ERK


def test_uniform_is_the_same_everywhere() -> None:
    assert uniform(LAYERS, 0.3) == {layer.name: 0.3 for layer in LAYERS}


def rounds_of_erdos_renyi(raw: list[float], sizes: list[int], density: float) -> list[float]:
    """The reference way: whoever would exceed 1 is dense, the others are solved for again."""
    dense: set[int] = set()
    while True:
        others = [i for i in range(len(raw)) if i not in dense]
        budget = density * sum(sizes) - sum(sizes[i] for i in dense)
        epsilon = budget / sum(raw[i] * sizes[i] for i in others)
        full = {i for i in others if epsilon * raw[i] > 1}
        if not full:
            return [1.0 if i in dense else epsilon * raw[i] for i in range(len(raw))]
        dense |= full


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    ("spread", "raw_of"),
    [
        (er, lambda shape: sum(shape[:2]) / math.prod(shape[:2])),
        (erk, lambda shape: sum(shape) / math.prod(shape)),
    ],
)
def test_erdos_renyi_is_the_reference_and_meets_the_budget(
    spread: Callable[..., dict[str, float]],
    raw_of: Callable[[tuple[int, ...]], float],
    sparsity: float,
) -> None:
    shares = spread(LAYERS, sparsity)
    raw = [raw_of(layer.shape) for layer in LAYERS]
    expected = rounds_of_erdos_renyi(raw, [layer.numel for layer in LAYERS], 1 - sparsity)
    assert [1 - shares[layer.name] for layer in LAYERS] == pytest.approx(expected, abs=1e-12)
    assert abs(mean(LAYERS, shares) - sparsity) < 1e-12


def test_er_and_erk_differ_in_kernels_alone() -> None:
    linears = tuple(layer for layer in LAYERS if len(layer.shape) == 2)
    assert er(linears, 0.7) == erk(linears, 0.7)
    assert er(LAYERS, 0.7) != erk(LAYERS, 0.7)


@pytest.mark.parametrize("spread", [uniform, er, erk])
@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 50.0, math.nan])
def test_a_sparsity_outside_its_range_is_refused(
    spread: Callable[..., dict[str, float]], sparsity: float
) -> None:
    with pytest.raises(InvalidAllocation, match="Half of the weights is 0.5, not 50"):
        spread(LAYERS, sparsity)


# ---- in proportion to scores


def rounds_of_handing_out(
    scores: list[float], sizes: list[int], density: float, max_sparsity: float
) -> list[float]:
    """The reference way: hand out the rest by score, cap, leave full layers out, again."""
    got = [(1 - max_sparsity) * size for size in sizes]
    live = list(scores)
    for _ in sizes:
        rest = density * sum(sizes) - sum(got)
        if rest < 1e-9 * sum(sizes):
            break
        whole = sum(live)
        got = [have + rest * score / whole for have, score in zip(got, live, strict=True)]
        live = [
            0.0 if have >= size else score
            for have, size, score in zip(got, sizes, live, strict=True)
        ]
        got = [min(have, size) for have, size in zip(got, sizes, strict=True)]
    return got


@pytest.mark.parametrize("sparsity", [0.01, 0.2, 0.5, 0.7, 0.8])
def test_scores_are_handed_out_as_in_the_reference(sparsity: float) -> None:
    scores = {"stem": 9.0, "wide": 1.0, "taps": 4.0, "thin": 0.2, "head": 3.0}
    shares = by_score(LAYERS, scores, sparsity, 0.8)
    sizes = [layer.numel for layer in LAYERS]
    expected = rounds_of_handing_out([*scores.values()], sizes, 1 - sparsity, 0.8)
    got = [(1 - shares[layer.name]) * layer.numel for layer in LAYERS]
    assert got == pytest.approx(expected, rel=1e-7)


@settings(deadline=None, max_examples=200)
@given(
    scores=st.lists(st.floats(0, 1e12), min_size=5, max_size=5),
    sparsity=st.floats(0, 0.999),
    room=st.floats(0, 0.999),
)
def test_any_scores_meet_the_budget_within_the_caps(
    scores: list[float], sparsity: float, room: float
) -> None:
    max_sparsity = sparsity + room * (0.9999 - sparsity)
    named = {layer.name: score for layer, score in zip(LAYERS, scores, strict=True)}
    shares = by_score(LAYERS, named, sparsity, max_sparsity)
    assert abs(mean(LAYERS, shares) - sparsity) < 1e-9
    assert all(0 <= share <= max_sparsity + 1e-12 for share in shares.values())
    kept_above = {layer.name: (max_sparsity - shares[layer.name]) * layer.numel for layer in LAYERS}
    open_ones = [layer.name for layer in LAYERS if shares[layer.name] > 1e-9]
    for a in open_ones:  # among layers that are not full, a larger score never gets less
        for b in open_ones:
            is_more = named[a] >= named[b] and named[a] > 1e-99 * max(scores)
            assert not is_more or kept_above[a] >= kept_above[b] - 1e-6


def test_a_block_shares_one_sparsity_by_its_summed_score() -> None:
    layers = blocks(3)
    scores = {layer.name: 1.0 + int(layer.block) for layer in layers}
    shares = by_score(layers, scores, 0.5, 0.8, "block")
    of_block = [shares[f"{block}.0"] for block in range(3)]
    assert shares == {layer.name: of_block[int(layer.block)] for layer in layers}
    # 0.2 each, then 0.9 of a block in proportion to 2 : 4 : 6.
    assert of_block == pytest.approx([0.8 - 0.15, 0.8 - 0.3, 0.8 - 0.45])


def test_a_cap_below_the_budget_is_refused() -> None:
    with pytest.raises(ImpossibleBudget, match=r"at least 0.2 of its weights.* leaves 0.1 of all"):
        by_score(LAYERS, {layer.name: 1.0 for layer in LAYERS}, 0.9, 0.8)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_score_that_is_no_importance_names_its_layer(bad: float) -> None:
    scores = {layer.name: 1.0 for layer in LAYERS} | {"thin": bad}
    with pytest.raises(InvalidAllocation, match="of thin"):
        by_score(LAYERS, scores, 0.5, 0.8)


# ---- OWL


@pytest.mark.parametrize("rows", [3, 2000])
def test_outliers_are_counted_over_the_whole_block(rows: int) -> None:
    """2000 rows are scored in several chunks."""
    block = [
        (random(rows, 1024, seed=1).exp().to(torch.bfloat16), random(1024, seed=2).exp().double()),
        (random(5, 30, seed=3) * 100, random(30, seed=4).abs()),
    ]
    scores = torch.cat([(w.double().abs() * norms.double()).flatten() for w, norms in block])
    expected = 100 * float((scores > 5 * scores.mean()).double().mean())
    assert 0 < expected < 100
    assert outlier_share(block, 5.0) == pytest.approx(expected, abs=1e-9)


def test_a_block_of_zeros_has_no_outliers() -> None:
    assert outlier_share([(torch.zeros(3, 4), torch.ones(4))], 5.0) == 0
    assert outlier_share([], 5.0) == 0


def test_owl_is_the_papers_rule_where_nothing_is_clipped() -> None:
    layers = blocks(5)
    outliers = {str(block): (block - 1.7) ** 2 for block in range(5)}
    shares = owl(layers, outliers, 0.7, 0.08)
    low, high = min(outliers.values()), max(outliers.values())
    wanted = {block: (share - low) / (high - low) * 0.16 for block, share in outliers.items()}
    average = sum(wanted.values()) / 5
    for layer in layers:
        assert 1 - shares[layer.name] == pytest.approx(wanted[layer.block] - average + 0.3)
    assert max(shares.values()) - min(shares.values()) == pytest.approx(0.16)


@settings(deadline=None, max_examples=200)
@given(
    outliers=st.lists(st.floats(0, 100), min_size=1, max_size=12),
    sparsity=st.floats(0, 0.9999),
    spread=st.floats(0, 0.5),
)
def test_owl_keeps_mean_spread_and_range(
    outliers: list[float], sparsity: float, spread: float
) -> None:
    layers = blocks(len(outliers))
    named = {str(block): share for block, share in enumerate(outliers)}
    shares = owl(layers, named, sparsity, spread)
    of_block = [shares[f"{block}.0"] for block in range(len(outliers))]
    assert all(shares[layer.name] == of_block[int(layer.block)] for layer in layers)
    assert abs(math.fsum(of_block) / len(of_block) - sparsity) < 1e-9
    assert max(of_block) - min(of_block) <= 2 * spread + 1e-9
    assert all(0 <= share <= max(1 - LEAST_DENSITY, sparsity) + 1e-12 for share in of_block)
    for a, more in zip(outliers, of_block, strict=True):
        for b, less in zip(outliers, of_block, strict=True):
            assert a <= b or more <= less + 1e-12  # more outliers never mean more zeros


def test_equal_blocks_stay_equal() -> None:
    shares = owl(blocks(3), {str(block): 4.2 for block in range(3)}, 0.6, 0.08)
    assert [*shares.values()] == pytest.approx([0.6] * 6)


def test_blocks_of_unequal_size_meet_the_budget_in_parameters() -> None:
    layers = (Layer("a", "0", (10, 10)), Layer("b", "1", (90, 10)))
    shares = owl(layers, {"0": 9.0, "1": 1.0}, 0.7, 0.08)
    assert mean(layers, shares) == pytest.approx(0.7, abs=1e-12)
    assert shares["b"] - shares["a"] == pytest.approx(0.16)


def test_an_outlier_share_that_is_no_number_names_its_block() -> None:
    with pytest.raises(InvalidAllocation, match="nan of 1"):
        owl(blocks(2), {"0": 1.0, "1": math.nan}, 0.7, 0.08)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (15, 16)])
def test_mixed_nm_keeps_what_the_uniform_one_keeps(n: int, m: int) -> None:
    outliers = {str(block): float(block**2) for block in range(7)}
    found = owl_nm(blocks(7), outliers, n, m, 2.0)
    of_block = [found[f"{block}.0"] for block in range(7)]
    assert sum(of_block) == 7 * n
    assert sorted(of_block) == of_block
    assert min(of_block) >= 1 and max(of_block) <= m - 1
    assert max(of_block) - min(of_block) <= 3  # a range of 2, rounded at both ends
    assert (len(set(of_block)) > 1) == (1 < n < m - 1)


def test_mixed_nm_never_exceeds_the_budget_of_unequal_blocks() -> None:
    layers = tuple(Layer(str(b), str(b), (size, 8)) for b, size in enumerate((10, 37, 5, 90)))
    found = owl_nm(layers, {"0": 5.0, "1": 9.0, "2": 1.0, "3": 2.0}, 4, 8, 2.0)
    spent = sum(found[layer.name] * layer.numel for layer in layers)
    asked = 4 * sum(layer.numel for layer in layers)
    assert asked - max(layer.numel for layer in layers) < spent <= asked


@pytest.mark.parametrize("numel", [1, 7, 100, 147456, 884736])
def test_shares_count_out_exactly(numel: int) -> None:
    drops = {*range(min(numel, 200)), numel // 3, numel // 2, numel - 1}
    assert all(int(share_of(drop, numel) * numel) == drop for drop in drops)
    assert all(share_of(drop, numel) < 1 for drop in drops)


# ---- what a recipe may say


@pytest.mark.parametrize("kind", [Uniform, ER, ERK, OWL, GlobalMagnitude, ZerothOrder, Knapsack])
def test_every_allocation_has_working_values(kind: Callable[[], Any]) -> None:
    allocation = kind()
    assert allocation == kind() and hash(allocation) == hash(kind())
    for field in fields(allocation):
        with pytest.raises(AttributeError):
            setattr(allocation, field.name, 1)


@pytest.mark.parametrize(
    ("kind", "given", "rule"),
    [
        (OWL, {"spread": 0.6}, "spread=0.6 must lie in"),
        (OWL, {"spread": "wide"}, "spread='wide' must lie in"),
        (OWL, {"outlier": -1.0}, "outlier=-1.0"),
        (OWL, {"nm_spread": math.inf}, "nm_spread=inf"),
        (GlobalMagnitude, {"min_keep": 1.0}, "min_keep=1.0"),
        (GlobalMagnitude, {"min_keep": True}, "min_keep=True"),
        (ZerothOrder, {"samples": 0}, "samples=0"),
        (ZerothOrder, {"samples": 2.5}, "samples=2.5"),
        (ZerothOrder, {"epsilon": 0.0}, "epsilon=0.0"),
        (ZerothOrder, {"max_sparsity": 1.0}, "max_sparsity=1.0"),
        (ZerothOrder, {"score": "fisher"}, "one of gradient, magnitude, square"),
        (ZerothOrder, {"per": "model"}, "one of weight, block"),
        (ZerothOrder, {"seed": -1}, "seed=-1"),
        (Knapsack, {"choices": ()}, "at least one pattern"),
        (Knapsack, {"choices": (0.5,)}, "the choice 0.5"),
        (Knapsack, {"budget": "flops"}, "one of parameters, bytes, time"),
        (Knapsack, {"budget": "time"}, "target is given"),
        (Knapsack, {"target": "A100"}, "target is given"),
        (Knapsack, {"budget": "time", "target": "abacus"}, "device='abacus' is not a choice"),
        (Knapsack, {"rows": 0}, "rows=0"),
        (Knapsack, {"share": 0.0}, "share=0.0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    kind: Callable[..., object], given: dict[str, object], rule: str
) -> None:
    with pytest.raises(SparseFXError, match=rule):
        kind(**given)
