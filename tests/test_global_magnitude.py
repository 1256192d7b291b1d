"""Global magnitude keeps the largest of all weights, as many as asked, and some in each layer."""

from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsefx.errors import ImpossibleBudget, InvalidAllocation
from sparsefx.patterns import Unstructured
from sparsefx.prune.allocation import global_magnitude as module
from sparsefx.prune.allocation.global_magnitude import global_magnitude

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def model(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"small": (3, 5), "conv": (8, 4, 3, 3), "flat": (64, 10), "wide": (20, 90)}
    return {
        name: (torch.randn(shape, generator=generator) * 3.0**i).to(dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


def drops(weights: dict[str, Tensor], shares: dict[str, float]) -> list[int]:
    return [int(shares[name] * weight.numel()) for name, weight in weights.items()]


def sorted_drops(weights: dict[str, Tensor], sparsity: float, min_keep: float) -> list[int]:
    """By sorting everything: first each layer's own minimum, then the largest of what is left."""
    count = sum(weight.numel() for weight in weights.values())
    keep = count - int(sparsity * count)
    ranked: list[tuple[float, int]] = []
    kept = []
    for number, weight in enumerate(weights.values()):
        sizes = weight.float().abs().flatten().sort(descending=True).values.tolist()
        least = min(len(sizes), max(1, ceil(min_keep * count)))
        kept.append(least)
        ranked += [(-size, number) for size in sizes[least:]]
    for _, number in sorted(ranked)[: keep - sum(kept)]:
        kept[number] += 1
    return [weight.numel() - have for weight, have in zip(weights.values(), kept, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("min_keep", [0.0, 0.002])
def test_counts_are_those_of_a_sort(dtype: torch.dtype, sparsity: float, min_keep: float) -> None:
    weights = model(dtype)
    found = drops(weights, global_magnitude(weights, sparsity, min_keep))
    assert found == sorted_drops(weights, sparsity, min_keep)
    assert sum(found) == int(sparsity * sum(weight.numel() for weight in weights.values()))


@settings(deadline=None, max_examples=150)
@given(data=st.data(), sparsity=st.floats(0, 0.99), min_keep=st.floats(0, 0.3))
def test_ties_and_extremes_count_exactly(
    data: st.DataObject, sparsity: float, min_keep: float
) -> None:
    numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 1e-45, -3e38, 0.1, -0.1])
    layers = data.draw(st.lists(st.lists(numbers, min_size=1, max_size=12), min_size=1, max_size=5))
    weights = {str(i): torch.tensor(values) for i, values in enumerate(layers)}
    expected = sorted_drops(weights, sparsity, min_keep)
    asked = int(sparsity * sum(map(len, layers)))
    if sum(expected) == asked:
        assert drops(weights, global_magnitude(weights, sparsity, min_keep)) == expected
    else:  # the minima alone are more than may be kept
        with pytest.raises(ImpossibleBudget):
            global_magnitude(weights, sparsity, min_keep)


def test_patterns_at_these_shares_are_the_global_mask() -> None:
    weights = {name: weight / weight.std() for name, weight in model().items()}
    shares = global_magnitude(weights, 0.5)
    masks = [
        Unstructured(shares[name]).keep(weight.flatten(1).abs()).flatten()
        for name, weight in weights.items()
    ]
    everything = torch.cat([weight.flatten().abs() for weight in weights.values()])
    threshold = everything.sort().values[int(0.5 * everything.numel())]
    assert torch.equal(torch.cat(masks), everything >= threshold)
    assert len(set(shares.values())) == len(shares)


def test_a_minimum_keeps_a_layer_from_collapse_and_a_smaller_layer_dense() -> None:
    weights = model() | {"faint": torch.full((30, 20), 1e-6)}
    count = sum(weight.numel() for weight in weights.values())
    bare, held = global_magnitude(weights, 0.9), global_magnitude(weights, 0.9, 0.02)
    assert drops(weights, bare)[-1] == 599  # of 600
    assert drops(weights, held)[-1] == 600 - ceil(0.02 * count)
    assert held["small"] == 0 and weights["small"].numel() < 0.02 * count
    assert sum(drops(weights, held)) == int(0.9 * count)


def test_ties_at_the_threshold_stay_in_the_earlier_layers() -> None:
    weights = {name: torch.ones(10) for name in "abc"}
    assert drops(weights, global_magnitude(weights, 0.5)) == [0, 6, 9]


def test_scans_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = global_magnitude(model(), 0.7, 0.001)
    monkeypatch.setattr(module, "_CHUNK", 7)
    assert global_magnitude(model(), 0.7, 0.001) == whole


def test_weights_are_not_changed() -> None:
    weights = model()
    global_magnitude(weights, 0.7)
    assert all(torch.equal(weight, model()[name]) for name, weight in weights.items())


def test_minima_beyond_the_budget_are_refused_with_numbers() -> None:
    with pytest.raises(ImpossibleBudget, match=r"adds up to \d+ of 2743 weights .* leaves 275"):
        global_magnitude(model(), 0.9, 0.2)


@pytest.mark.parametrize("sparsity", [1.0, -0.5, float("nan")])
def test_a_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(InvalidAllocation):
        global_magnitude(model(), sparsity)
