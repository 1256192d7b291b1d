"""Within: budgets of what a layer or the model may lose."""

import copy
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.allocations import Allocation
from sparsefx.annotations import annotations
from sparsefx.errors import InvalidAllocation, InvalidRecipe, MissingCalibration
from sparsefx.patterns import Pattern
from sparsefx.prune.sensitivity.within import LayersStayDense, first, ladder
from sparsefx.prune.solve import solve
from tests.hf_models import ids, llama
from tests.layer_inputs import observed
from tests.residual_net import NAMES, WANDA, Distance, Net, X, by_wanda, error_of, inputs

HALF = replace(WANDA, sparsity=0.5)


def test_ladders_end_before_dense() -> None:
    shares = [rung.sparsity for rung in ladder(sparsefx.Unstructured(0.62))]
    assert shares == [0.62, *(step / 20 for step in range(12, 0, -1))]
    assert [rung.sparsity for rung in ladder(sparsefx.Rows(0.15))] == [0.15, 0.1, 0.05]
    assert ladder(sparsefx.NM(1, 4)) == [sparsefx.NM(n, 4) for n in (1, 2, 3)]
    block = sparsefx.Block(4, 2, 0.1, sparsefx.Wanda())
    assert ladder(block) == [block, replace(block, sparsity=0.05)]


@pytest.mark.parametrize("count", range(9))
def test_first_asks_for_what_it_returns(count: int) -> None:
    for answer in range(count + 1):
        asked = set[int]()

        def holds(at: int, answer: int = answer, asked: set[int] = asked) -> bool:
            asked.add(at)
            return at >= answer

        assert first(count, holds) == answer
        assert answer == count or answer in asked
        assert len(asked) <= 1 + math.ceil(math.log2(count + 1))


def pruned(model: nn.Module, pattern: Pattern, allocation: Allocation, *names: str) -> nn.Module:
    recipe = sparsefx.Recipe(dict.fromkeys(names or ("*",), pattern), allocation=allocation)
    return sparsefx.sparsify(model, recipe, [X], progress=False)


@pytest.mark.parametrize("bound", [0.2, 0.3])  # where dense inputs would give other rungs
def test_within_an_error_takes_the_sparsest_rung_on_pruned_inputs(bound: float) -> None:
    """Against every rung of every layer, each measured in float64 behind the pruned ones."""
    model = Net()
    fast = pruned(model, WANDA, sparsefx.Within(error=bound))
    expected = copy.deepcopy(model)
    patterns: dict[str, Pattern] = {}
    # The layers of one block read what the dense block gives, behind pruned ones.
    read = {}
    for name in NAMES:
        if name not in read:
            together = [other for other in NAMES if other[:8] == name[:8]]
            read |= {other: inputs(expected, other) for other in together}
        weight, x = expected.get_parameter(name).detach(), read[name]
        for rung in ladder(WANDA):
            kept = by_wanda(weight, x, rung.sparsity)
            if error_of(weight, kept, x) <= bound:
                patterns[name] = rung
                expected.get_parameter(name).data = kept
                break
    assert annotations(fast) == patterns and len(set(patterns.values())) > 2
    for mine, other in zip(fast.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, other)
    for layer in sparsefx.pruning_report(fast).layers:
        assert layer.error is not None and layer.error <= bound


def test_within_an_error_on_a_llama() -> None:
    """N:M under SparseGPT in all layers: the errors in the report hold, and some give way."""
    data = [{"input_ids": ids(2, 40), "use_cache": False}]
    pattern = sparsefx.NM(1, 4, sparsefx.SparseGPT())
    recipe = sparsefx.Recipe({"model.layers.*": pattern}, allocation=sparsefx.Within(error=0.3))
    fast = sparsefx.sparsify(llama().model, recipe, data, progress=False)
    layers = sparsefx.pruning_report(fast).layers
    assert len(layers) == 14 and len({layer.pattern for layer in layers}) > 1
    assert all(layer.error is not None and layer.error <= 0.3 for layer in layers)


def test_layers_that_no_pattern_keeps_within_stay_dense_and_are_named() -> None:
    model = Net()
    with pytest.warns(LayersStayDense, match="2 of 2 layers stay dense.*up.weight.*at 3:4"):
        fast = pruned(model, sparsefx.NM(2, 4), sparsefx.Within(error=1e-3), *NAMES[:1], NAMES[4])
    assert annotations(fast) == {}
    assert all(map(torch.equal, fast.parameters(), model.parameters()))


def test_within_a_metric_backs_off_until_it_holds() -> None:
    model = Net()
    metric = Distance(model)
    names = NAMES[:-1]
    fast = pruned(model, WANDA, sparsefx.Within(metric=metric, drop=0.2), *names)
    assert 3 <= metric.calls <= 8
    with torch.no_grad():
        assert 1 + 1e-3 < metric(fast) <= 1.2
        everything = pruned(model, WANDA, sparsefx.Uniform(), *names)
        assert metric(everything) > 1.2
    reached = sparsefx.pruning_report(fast).totals.reached
    assert reached > 0.1
    # All layers are on two rungs next to each other: the further one for those that err most.
    stayed, moved, rungs = [], [], ladder(WANDA)
    at = {name: rungs.index(pattern) for name, pattern in annotations(fast).items()}
    least = min(at.values())
    for name, rung in at.items():
        weight, x = model.get_parameter(name).detach(), inputs(model, name)
        kept = solve(weight, rungs[least], observed(x.float(), "squares")).weight
        (stayed if rung == least else moved).append(error_of(weight, kept, x))
    assert set(at) == set(names) and set(at.values()) == {least, least + 1}
    assert max(stayed) < min(moved)


def test_within_a_metric_asks_once_for_what_holds_and_little_for_what_never_does() -> None:
    model = Net()
    easy, hard = Distance(model), Distance(model)
    fast = pruned(model, WANDA, sparsefx.Within(metric=easy, drop=0.99), *NAMES[:2])
    assert easy.calls == 2 and set(annotations(fast).values()) == {WANDA}
    before = copy.deepcopy(model.state_dict())
    name = NAMES[1]
    weight, x = model.get_parameter(name).detach(), inputs(model, name)
    error = error_of(weight, by_wanda(weight, x, 0.05), x)
    with pytest.warns(LayersStayDense, match=rf"1 of 1 .* error {error:.3g} at unstructured 5%"):
        fast = pruned(model, WANDA, sparsefx.Within(metric=hard, drop=1e-6), name)
    assert hard.calls <= 8 and annotations(fast) == {}
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_nothing_warns_where_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = pruned(Net(), HALF, sparsefx.Within(error=0.99))
    assert set(annotations(fast).values()) == {HALF}


def test_within_is_checked(tmp_path: Path) -> None:
    metric = Distance(Net())
    for options in (
        {},
        {"error": 0.1, "metric": metric, "drop": 0.1},
        {"error": 0.1, "drop": 0.1},
        {"metric": metric},
        {"metric": "loss", "drop": 0.1},
        {"metric": metric, "drop": 1.0},
        {"error": 0.0},
        {"error": math.nan},
        {"error": True},
    ):
        with pytest.raises(InvalidAllocation, match="Write Within"):
            sparsefx.Within(**options)  # type: ignore[arg-type]
    recipe = sparsefx.Recipe(
        {"*": sparsefx.Unstructured(0.5)}, allocation=sparsefx.Within(error=0.1)
    )
    with pytest.raises(MissingCalibration, match="Within"):
        sparsefx.sparsify(Net(), recipe)
    path = tmp_path / "recipe.toml"
    recipe.to_toml(path)
    assert sparsefx.Recipe.from_toml(path) == recipe
    path.write_text(path.read_text().replace("error = 0.1", 'metric = "loss"\ndrop = 0.1'))
    with pytest.raises(InvalidRecipe, match="not a key of within"):
        sparsefx.Recipe.from_toml(path)
    asked = sparsefx.Recipe({"*": HALF}, allocation=sparsefx.Within(metric=metric, drop=0.1))
    with pytest.raises(InvalidRecipe, match="function"):
        asked.to_toml(path)
