"""sparsify() on calibration data: criteria, allocations, resuming, and what it reports."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.allocations import Allocation
from sparsefx.annotations import annotations, attention_thresholds
from sparsefx.criteria import Criterion
from sparsefx.errors import (
    ForeignCalibration,
    InvalidAllocation,
    MissingCalibration,
    NonFiniteActivation,
)
from sparsefx.patterns import Pattern
from sparsefx.prune.report.records import PruneReport
from tests.hf_models import ids, llama

LAYERS = "model.layers.*"
HALF = sparsefx.Unstructured(0.5)
DATA = [{"input_ids": ids(2, length), "use_cache": False} for length in (40, 40, 24)]


class Net(nn.Module):
    """Two linears; the second is fed by what the first gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu())
        return y


def rows(count: int = 64) -> Tensor:
    """Inputs whose features differ in size, so that Wanda and magnitude disagree."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 16, generator=generator) * torch.logspace(-1, 1, 16)


def pruned(
    pattern: Pattern, allocation: Allocation | None = None, model: nn.Module | None = None
) -> nn.Module:
    recipe = sparsefx.Recipe({LAYERS: pattern}, allocation=allocation)
    return sparsefx.sparsify(model or llama().model, recipe, DATA, progress=False)


def error(model: nn.Module) -> float:
    found = sparsefx.pruning_report(model).totals.mean_error
    assert found is not None
    return found


def sum_of_squares(report: PruneReport) -> float:
    return sum((layer.error or 0.0) ** 2 for layer in report.layers)


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight != 0 for name, weight in model.named_parameters() if "proj" in name}


@pytest.mark.parametrize("pattern", [HALF, sparsefx.NM(2, 4)], ids=str)
def test_each_criterion_errs_less_than_the_one_before(pattern: Pattern) -> None:
    model = llama().model
    before = copy.deepcopy(model.state_dict())
    errors = []
    best = sparsefx.Reconstruct(sparsefx.SparseGPT(), damp=0.01)
    for criterion in (sparsefx.Random(), sparsefx.Wanda(), sparsefx.SparseGPT(), best):
        # A data-free criterion among others runs in the same pass, with its error measured.
        recipe = sparsefx.Recipe(
            {
                "*.0.mlp.down_proj.*": replace(pattern, criterion=sparsefx.Wanda()),
                LAYERS: replace(pattern, criterion=criterion),
            }
        )
        fast = sparsefx.sparsify(model, recipe, DATA, progress=False)
        report = sparsefx.pruning_report(fast)
        assert report.check() == [] and len(report.layers) == 14
        assert report.totals.reached == pytest.approx(0.5, abs=0.01)
        assert annotations(fast) == {
            layer.name: recipe.pattern_for(layer.name) for layer in report.layers
        }
        errors.append(error(fast))
    assert errors[0] > errors[1] > errors[2] > errors[3] > 0
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_wanda_is_sequential_by_hand() -> None:
    """The second layer's norms are those of what the pruned first layer gives."""
    model, x = Net(), rows()
    recipe = sparsefx.Recipe({"*": sparsefx.Unstructured(0.5, sparsefx.Wanda())})
    fast = sparsefx.sparsify(model, recipe, [x[:40], x[40:]], progress=False)
    expected = copy.deepcopy(model)
    for layer, read in (
        (expected.first, lambda: x),
        (expected.second, lambda: expected.first(x).relu()),
    ):
        with torch.no_grad():
            scores = layer.weight.double().abs() * read().double().norm(dim=0)
            drop = scores.argsort(dim=1)[:, : layer.in_features // 2]
            layer.weight.scatter_(1, drop, 0.0)
    for mine, other in zip(fast.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_padding_does_not_count() -> None:
    kept = ids(1, 32)
    padded = torch.cat([kept, torch.full((1, 16), 5)], 1)
    mask = torch.cat([torch.ones(1, 32), torch.zeros(1, 16)], 1).long()
    recipe = sparsefx.Recipe({LAYERS: sparsefx.Unstructured(0.5, sparsefx.Wanda())})
    model = llama().model
    plain = [{"input_ids": kept, "attention_mask": torch.ones_like(kept), "use_cache": False}]
    more = [{"input_ids": padded, "attention_mask": mask, "use_cache": False}]
    first, second = (sparsefx.sparsify(model, recipe, d, progress=False) for d in (plain, more))
    for name, keep in masks(first).items():
        assert (keep == masks(second)[name]).float().mean() > 0.99  # equal up to rounding


ALLOCATIONS: list[Allocation] = [
    sparsefx.Uniform(),
    sparsefx.ER(),
    sparsefx.ERK(),
    sparsefx.OWL(),
    sparsefx.GlobalMagnitude(min_keep=1e-3),
    sparsefx.ZerothOrder(samples=1),
    sparsefx.Knapsack(
        choices=tuple(sparsefx.Unstructured(s / 10) for s in range(2, 9)), budget="parameters"
    ),
]


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=lambda each: type(each).__name__)
def test_allocations_keep_the_budget(allocation: Allocation) -> None:
    fast = pruned(replace(HALF, criterion=sparsefx.Wanda()), allocation)
    totals = sparsefx.pruning_report(fast).totals
    # Wanda counts in each row; a knapsack may leave some of its budget.
    assert 0.5 - 0.02 <= totals.reached <= 0.5 + 0.03
    shares = {round(layer.reached, 2) for layer in sparsefx.pruning_report(fast).layers}
    assert len(shares) == 1 if isinstance(allocation, sparsefx.Uniform) else len(shares) > 1


def test_a_knapsack_errs_less_than_uniform_at_equal_parameters() -> None:
    pattern, model = replace(HALF, criterion=sparsefx.SparseGPT()), llama().model
    levels = tuple(sparsefx.Unstructured(each / 10) for each in range(1, 10))
    knapsack = sparsefx.Knapsack(levels, budget="parameters", objective="error")
    uniform, spread = (
        sparsefx.pruning_report(pruned(pattern, allocation, model))
        for allocation in (None, knapsack)
    )
    assert sum_of_squares(spread) < sum_of_squares(uniform)
    assert spread.totals.reached == pytest.approx(0.5, abs=0.01)


def test_mixed_patterns_of_a_knapsack_and_of_owl() -> None:
    choices = (None, sparsefx.NM(2, 4), sparsefx.NM(4, 8), sparsefx.Unstructured(0.7))
    pattern = sparsefx.NM(2, 4, sparsefx.Wanda())
    fast = pruned(pattern, sparsefx.Knapsack(choices))
    report = sparsefx.pruning_report(fast)
    assert {layer.pattern for layer in report.layers} <= {"2:4", "4:8", "unstructured 70%", "dense"}
    assert {layer.criterion for layer in report.layers} <= {"Wanda", "-"}
    wide = sparsefx.NM(4, 8, sparsefx.Wanda())
    owl = sparsefx.pruning_report(pruned(wide, sparsefx.OWL(nm_spread=4.0)))
    assert len({layer.pattern for layer in owl.layers}) > 1
    with pytest.raises(InvalidAllocation, match="leaves no sparsity to spread"):
        pruned(pattern, sparsefx.ERK())


def test_resumes_to_the_same_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsefx.prune import decide

    recipe = sparsefx.Recipe({LAYERS: sparsefx.NM(2, 4, sparsefx.SparseGPT())})
    model = llama().model
    whole = sparsefx.sparsify(model, recipe, DATA, progress=False)
    calls = 0
    original = decide.record_of

    def stopping(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 10:  # in the second of two blocks of seven weights
            raise KeyboardInterrupt
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(decide, "record_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        sparsefx.sparsify(model, recipe, DATA, progress=False, state=tmp_path)
    resumed = sparsefx.sparsify(model, recipe, DATA, progress=False, state=tmp_path)
    assert calls == 10 + 7  # the first block was not decided again
    for mine, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)
    lines = sparsefx.pruning_report(resumed).layers
    assert [layer.name for layer in lines] == list(masks(whole))
    other_recipe = sparsefx.Recipe({LAYERS: sparsefx.NM(1, 4, sparsefx.SparseGPT())})
    with pytest.raises(ForeignCalibration):
        sparsefx.sparsify(model, other_recipe, DATA, progress=False, state=tmp_path)


@pytest.mark.parametrize("criterion", [sparsefx.Wanda(), sparsefx.SparseGPT()])
def test_a_model_larger_than_the_memory_for_activations(
    criterion: Criterion, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsefx.calibrate import spill

    original, written = spill.save, []

    def counting(tensors: dict[str, Tensor]) -> bytes:
        written.append(len(tensors))
        return original(tensors)

    monkeypatch.setattr(spill, "save", counting)
    model, limit = llama().model, 4000
    assert sum(weight.nbytes for weight in model.parameters()) > 10 * limit
    recipe = sparsefx.Recipe({LAYERS: sparsefx.NM(2, 4, criterion)})
    free = sparsefx.sparsify(model, recipe, DATA, progress=False)
    assert not written
    bounded = sparsefx.sparsify(model, recipe, DATA, progress=False, max_memory=limit)
    assert len(written) >= len(DATA)  # each batch, between blocks
    for mine, other in zip(bounded.parameters(), free.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_failures_leave_the_model_alone() -> None:
    model, x = Net(), rows()
    before = copy.deepcopy(model.state_dict())
    recipe = sparsefx.Recipe({"*": sparsefx.Unstructured(0.5, sparsefx.SparseGPT())})
    bad = x.clone()
    bad[3, 4] = float("nan")
    with pytest.raises(NonFiniteActivation, match="first"):
        sparsefx.sparsify(model, recipe, [x, bad], inplace=True, progress=False)
    with pytest.raises(MissingCalibration, match="SparseGPT"):
        sparsefx.sparsify(model, recipe, inplace=True, progress=False)
    owl = sparsefx.Recipe({"*": HALF}, allocation=sparsefx.OWL())
    with pytest.raises(MissingCalibration, match="OWL"):
        sparsefx.sparsify(model, owl, inplace=True, progress=False)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert annotations(model) == {}


def test_in_place_with_attention_from_a_generator() -> None:
    """Both calibrations read batches that come only once, and the model itself changes."""
    model = llama().model
    weights = sparsefx.Unstructured(0.5, sparsefx.Wanda())
    recipe = sparsefx.Recipe({LAYERS: weights}, sparsefx.Theta(k=8))
    batches = ({"input_ids": ids(1, 80), "use_cache": False} for _ in range(2))
    same = sparsefx.sparsify(model, recipe, batches, inplace=True, progress=False)
    assert same is model and len(annotations(model)) == 14
    assert len(attention_thresholds(model)) == 2
    assert sparsefx.pruning_report(model).totals.reached == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "criterion", [sparsefx.Wanda(), sparsefx.SparseGPT(), sparsefx.DSnoT()], ids=repr
)
def test_convolutions(criterion: Criterion) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU()
    )
    x = torch.randn(4, 3, 12, 12)
    recipe = sparsefx.Recipe({"2.weight": sparsefx.NM(2, 4, criterion)})
    fast = sparsefx.sparsify(model, recipe, [x], progress=False)
    groups = (fast[2].weight != 0).movedim(1, -1).reshape(-1, 4).sum(1)
    assert (groups <= 2).all()
    by_size = sparsefx.sparsify(model, sparsefx.Recipe({"2.weight": sparsefx.NM(2, 4)}))
    exact = model(x)
    if not isinstance(criterion, sparsefx.DSnoT):  # it lowers the expected error, not this one
        assert (fast(x) - exact).norm() < (by_size(x) - exact).norm()


def test_pruned_models_compile_and_survive_saving(tmp_path: Path) -> None:
    model, x = Net(), rows()
    recipe = sparsefx.Recipe({"*": sparsefx.NM(2, 4, sparsefx.SparseGPT())})
    fast = sparsefx.sparsify(model, recipe, [x], progress=False)
    sparsefx.save(fast, tmp_path / "pruned", recipe=recipe)
    again = sparsefx.load(tmp_path / "pruned", Net())
    assert annotations(again) == annotations(fast)
    with torch.no_grad():
        torch.testing.assert_close(sparsefx.compile(again, guard="off")(x), fast(x))


def test_the_report_predicts_times_for_a_target() -> None:
    fast = pruned(sparsefx.NM(2, 4, sparsefx.Wanda()))
    report = sparsefx.pruning_report(fast, "H200", rows=1)
    assert all(layer.dense_us and layer.sparse_us for layer in report.layers)
    assert sparsefx.pruning_report(llama().model).layers == []


def test_recipes_with_allocations_survive_toml(tmp_path: Path) -> None:
    for allocation in (*ALLOCATIONS, sparsefx.Knapsack(), None):
        pattern = sparsefx.NM(2, 4, sparsefx.DSnoT(sparsefx.SparseGPT(damp=0.1)))
        weights = {"*.mlp.*": pattern, "*": None}
        recipe = sparsefx.Recipe(weights, allocation=allocation, permute=allocation is None)
        recipe.to_toml(tmp_path / "recipe.toml")
        assert sparsefx.Recipe.from_toml(tmp_path / "recipe.toml") == recipe


def test_random_masks_of_two_weights_differ() -> None:
    fast = pruned(replace(HALF, criterion=sparsefx.Random(3)))
    first, second = (fast.get_parameter(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1))
    assert not torch.equal(first != 0, second != 0)


def test_wanda_leaves_what_it_keeps_bit_for_bit() -> None:
    model = Net().double()
    recipe = sparsefx.Recipe({"*": sparsefx.Unstructured(0.5, sparsefx.Wanda())})
    fast = sparsefx.sparsify(model, recipe, [rows().double()], progress=False)
    for mine, other in zip(fast.parameters(), model.parameters(), strict=True):
        assert torch.equal(torch.where(mine != 0, other, 0), mine)


@pytest.mark.parametrize("criterion", [sparsefx.Magnitude(), sparsefx.SparseGPT()], ids=repr)
def test_permuting_channels_keeps_more_and_the_function(criterion: Criterion) -> None:
    model = llama().model
    before = copy.deepcopy(model.state_dict())
    weights = {"*.down_proj.*": sparsefx.NM(2, 4, criterion)}
    plain = sparsefx.sparsify(model, sparsefx.Recipe(weights), DATA, progress=False)
    recipe = sparsefx.Recipe(weights, permute=True)
    fast = sparsefx.sparsify(model, recipe, DATA, progress=False)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    report = sparsefx.pruning_report(fast)
    assert [layer.note for layer in report.layers] == ["its input channels were reordered"] * 2
    assert "2 layers: its input channels were reordered" in str(report)
    # The rows of up_proj moved along, and nothing but their order changed.
    up, moved = (each.get_parameter("model.layers.0.mlp.up_proj.weight") for each in (model, fast))
    assert not torch.equal(up, moved)
    assert torch.equal(up.sum(1).sort().values, moved.sum(1).sort().values)
    logits = [each(**DATA[0]).logits for each in (model, plain, fast)]
    errors = [float((each - logits[0]).detach().norm()) for each in logits[1:]]
    assert errors[1] < errors[0]
    sparsefx.sparsify(model, recipe, DATA, inplace=True, progress=False)
    for mine, other in zip(model.parameters(), fast.parameters(), strict=True):
        assert torch.equal(mine, other)
