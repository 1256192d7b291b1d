"""The knapsack finds the least error within its budget, or proves how far it may be from it."""

import itertools
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsefx.allocations import Knapsack
from sparsefx.errors import ImpossibleBudget, InvalidAllocation
from sparsefx.patterns import NM, Pattern, Unstructured
from sparsefx.prune.allocation.choose import choose, fits
from sparsefx.prune.allocation.costs import cost
from sparsefx.prune.allocation.knapsack import Choice, Selection, knapsack
from sparsefx.prune.allocation.layers import Layer

Table = Sequence[Sequence[Choice]]


def tried_out(layers: Table, budget: int) -> float:
    """The least error over every combination."""
    return min(
        (
            math.fsum(choice.error for choice in picks)
            for picks in itertools.product(*layers)
            if sum(choice.cost for choice in picks) <= budget
        ),
        default=math.inf,
    )


def relaxed(layers: Table, budget: int) -> float:
    """The linear relaxation by its dual, max over mu >= 0 of sum_l min_c (error + mu cost) - mu B.

    It is concave in mu: a golden-section search over mu's logarithm, float64.
    """

    def dual(log: float) -> float:
        mu = math.exp(log)
        least = (min(choice.error + mu * choice.cost for choice in choices) for choices in layers)
        return math.fsum(least) - mu * budget

    low, high, ratio = -80.0, 30.0, (math.sqrt(5) - 1) / 2
    for _ in range(120):
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (first, high) if dual(first) < dual(second) else (low, second)
    return max(dual(low), math.fsum(min(c.error for c in choices) for choices in layers))


def check(layers: Table, budget: int, found: Selection) -> None:
    """That a selection is what it says."""
    picks = [choices[i] for choices, i in zip(layers, found.chosen, strict=True)]
    assert found.cost == sum(choice.cost for choice in picks) <= budget
    assert found.error == math.fsum(choice.error for choice in picks)
    assert found.bound <= found.error


ERRORS = st.one_of(
    st.floats(0, 10), st.integers(0, 3).map(float), st.floats(0, 1e-9), st.floats(0, 1e9)
)
CHOICES = st.lists(st.builds(Choice, st.integers(0, 40), ERRORS), min_size=1, max_size=5)


@settings(deadline=None, max_examples=400)
@given(
    layers=st.lists(CHOICES, min_size=1, max_size=5),
    spare=st.integers(0, 90),
    unit=st.integers(1, 9),
)
def test_small_instances_are_solved_as_by_trying_everything(
    layers: list[list[Choice]], spare: int, unit: int
) -> None:
    layers = [[Choice(unit * c.cost, c.error) for c in choices] for choices in layers]
    budget = sum(min(choice.cost for choice in choices) for choices in layers) + spare
    found = knapsack(layers, budget)
    check(layers, budget, found)
    assert found.gap == 0
    assert found.error == pytest.approx(tried_out(layers, budget), rel=1e-9, abs=1e-300)


def test_choices_on_one_line_keep_their_order() -> None:
    """Equal slopes but for rounding: a later step of the relaxation must not come first."""
    costs = [(8, 26, 28, 29), (3, 6, 8)]
    layers = [[Choice(c, (top[-1] - c) * 0.7) for c in top] for top in costs]
    found = knapsack(layers, 35)
    assert found.error == pytest.approx(tried_out(layers, 35)) == pytest.approx(1.4)


@pytest.mark.parametrize("seed", range(20))
def test_ends_that_are_nearly_equal_are_told_apart(seed: int) -> None:
    """6,561 combinations, thousands of which are within 1 % of the best."""
    rng = random.Random(seed)
    rows = [sorted(rng.sample(range(1000), 3)) for _ in range(8)]
    layers = [[Choice(c, (1000 - c) * (1 + 1e-4 * rng.random())) for c in row] for row in rows]
    budget = sum(row[1] for row in rows) - seed
    assert knapsack(layers, budget).error == pytest.approx(tried_out(layers, budget), rel=1e-13)


SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))


def model_table(seed: int, jitter: int) -> list[list[Choice]]:
    """210 layers of the shapes of SmolLM2-135M, six choices in bytes; jitter breaks the divisor."""
    rng = random.Random(seed)
    table = []
    for _, (out, width) in itertools.product(range(30), SHAPES):
        scale = rng.lognormvariate(0, 1)
        choices = [Choice(4 * out * width, 0.0)]
        for sparsity, per_weight in (
            (0.3, 2.925),
            (0.5, 2.25),
            (0.5, 2.5),
            (0.5, 2.125),
            (0.7, 1.3),
        ):
            bytes_ = int(out * width * per_weight) + rng.randrange(jitter)
            choices.append(Choice(bytes_, scale * sparsity**2 * rng.uniform(0.9, 1.1)))
        table.append(choices)
    return table


@pytest.mark.parametrize("jitter", [1, 1000])
@pytest.mark.parametrize("share", [0.35, 0.5, 0.56, 0.8])
def test_a_whole_model_is_solved_exactly(jitter: int, share: float) -> None:
    layers = model_table(7, jitter)
    dense = sum(choices[0].cost for choices in layers)
    found = knapsack(layers, int(share * dense))
    check(layers, int(share * dense), found)
    assert found.gap < 1e-9
    bound = relaxed(layers, int(share * dense))
    # Rounding the relaxation costs at most the last step; here, of 210 layers, far less.
    assert bound * (1 - 1e-9) <= found.error <= bound * 1.001
    assert knapsack(layers, int(share * dense)) == found


def test_it_beats_any_uniform_choice_at_equal_cost() -> None:
    layers = model_table(3, 1)
    for position in range(6):
        budget = sum(choices[position].cost for choices in layers)
        uniform = math.fsum(choices[position].error for choices in layers)
        assert knapsack(layers, budget).error <= uniform


def test_a_larger_budget_is_never_worse_and_enough_is_free() -> None:
    layers = model_table(5, 1000)
    dense = sum(choices[0].cost for choices in layers)
    errors = [knapsack(layers, int(share * dense)).error for share in (0.4, 0.5, 0.6, 0.9, 1.0, 7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-2:] == [0.0, 0.0]


def hard(layers: int) -> tuple[list[list[Choice]], int]:
    """Every choice gains its cost plus a constant: all are alike to the relaxation."""
    rng = random.Random(0)
    costs = [rng.randrange(1, 10**12) for _ in range(layers)]
    return [[Choice(0, c + 1e10), Choice(c, 0.0)] for c in costs], sum(costs) // 2


@pytest.mark.parametrize("most_states", [1, 3, 10])
def test_what_cannot_be_proven_is_said(most_states: int) -> None:
    layers, budget = hard(12)
    exact = knapsack(layers, budget)
    assert exact.gap == 0 and exact.error == tried_out(layers, budget)
    narrow = knapsack(layers, budget, most_states)
    check(layers, budget, narrow)
    assert narrow.bound <= exact.error < narrow.error
    assert 0 < narrow.gap < 0.01


def test_huge_errors_do_not_drown_the_others() -> None:
    """A layer that diverged when pruned; its error must not cost the others their digits."""
    layers = model_table(7, 1000)
    budget = sum(choices[0].cost for choices in layers) // 2
    layers[11] = [layers[11][0], Choice(0, 1e30)]
    rest = [choices for i, choices in enumerate(layers) if i != 11]
    found = knapsack(layers, budget)
    assert found.chosen[11] == 0
    assert found.error == pytest.approx(
        knapsack(rest, budget - layers[11][0].cost).error, rel=1e-12
    )


def test_ties_are_decided_the_same_way_every_time() -> None:
    layers = [[Choice(0, 10.0), Choice(7, 3.0), Choice(11, 2.0), Choice(20, 0.0)]] * 40
    found = knapsack(layers, 301)
    assert found.gap == 0 and found == knapsack(layers, 301)


def test_an_empty_model_costs_nothing() -> None:
    assert knapsack([], 0) == Selection((), 0, 0.0, 0.0)


def test_an_infinite_error_is_never_taken() -> None:
    layers = [[Choice(0, math.inf), Choice(5, 2.0)], [Choice(1, 0.0)]]
    assert knapsack(layers, 6).chosen == (1, 0)
    with pytest.raises(ImpossibleBudget, match="layers cost 6 and 5 may be spent"):
        knapsack(layers, 5)
    with pytest.raises(ImpossibleBudget, match="no choice fits layer 1"):
        knapsack([layers[1], layers[0][:1]], 6)


@pytest.mark.parametrize(
    "bad", [Choice(-1, 0.0), Choice(1, -0.5), Choice(1, math.nan), Choice(2**53, 0.0)]
)
def test_choices_that_are_no_numbers_are_refused(bad: Choice) -> None:
    with pytest.raises(InvalidAllocation, match=r"\(layer 1\)"):
        knapsack([[Choice(1, 1.0)], [Choice(3, 1.0), bad]], 100)


# ---- patterns as choices

LAYERS = (
    Layer("q", "0", (64, 64)),
    Layer("up", "0", (128, 64)),
    Layer("odd", "1", (64, 62)),
    Layer("conv", "1", (32, 16, 3, 3)),
)
CHOSEN = (None, NM(2, 4), Unstructured(0.5), Unstructured(0.75))
ASKED = {layer.name: Unstructured(0.5) for layer in LAYERS}


def table(*important: str) -> dict[str, list[float]]:
    """Errors of CHOSEN for each layer; 2:4 is a little worse than 50 %."""
    return {
        layer.name: [e * (10 if layer.name in important else 1) for e in (0.0, 0.31, 0.3, 0.7)]
        for layer in LAYERS
    }


def spent(patterns: dict[str, Pattern | None], budget: str) -> int:
    return sum(cost(patterns[layer.name], layer, budget) for layer in LAYERS)


@pytest.mark.parametrize("budget", ["bytes", "parameters"])
def test_important_layers_are_bought_with_the_others(budget: str) -> None:
    allocation = Knapsack(CHOSEN, budget)
    chosen = choose(LAYERS, ASKED, table("q"), allocation)
    assert chosen.patterns["q"] is None
    assert Unstructured(0.75) in chosen.patterns.values()
    assert chosen.budget == spent(dict(ASKED), budget)
    assert spent(dict(chosen.patterns), budget) == chosen.selection.cost <= chosen.budget
    errors = table("q")
    uniform = sum(errors[layer.name][2] for layer in LAYERS)
    assert chosen.selection.error < uniform


def test_choices_that_do_not_fit_are_not_taken_nor_their_errors_read() -> None:
    errors = table()
    errors["odd"][1] = math.nan
    assert not fits(NM(2, 4), LAYERS[2]) and fits(NM(2, 4), LAYERS[3])
    chosen = choose(LAYERS, ASKED, errors, Knapsack(CHOSEN))
    assert not isinstance(chosen.patterns["odd"], NM)
    with pytest.raises(ImpossibleBudget, match=r"no choice fits odd of shape \(64, 62\)"):
        choose(LAYERS, ASKED, {name: [0.31] for name in errors}, Knapsack(CHOSEN[1:2]))


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_a_share_of_dense_is_a_budget_too(share: float) -> None:
    chosen = choose(LAYERS, {}, table(), Knapsack(CHOSEN, "parameters", share=share))
    dense = sum(layer.numel for layer in LAYERS)
    assert chosen.budget == int(share * dense)
    assert 0.8 * chosen.budget < spent(dict(chosen.patterns), "parameters") <= chosen.budget


def test_time_is_spent_where_a_pattern_gains_some() -> None:
    """The convolution takes its dense time under any pattern, so that it stays dense."""
    allocation = Knapsack(CHOSEN, "time", "A100", share=0.99)
    layers = (*LAYERS[:3], Layer("big", "2", (8192, 8192)), LAYERS[3])
    errors = table() | {"big": [0.0, 0.31, 0.3, 0.7]}
    chosen = choose(layers, {}, errors, allocation)
    assert chosen.patterns["conv"] is None
    assert chosen.patterns["big"] is not None
    assert chosen.selection.cost <= chosen.budget


def test_a_budget_below_the_sparsest_choices_is_refused() -> None:
    with pytest.raises(ImpossibleBudget, match="may be spent"):
        choose(LAYERS, {}, table(), Knapsack(CHOSEN, share=0.2))
