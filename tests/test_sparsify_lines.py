"""sparsify() on data: layers without input or left dense, and what the report says of them."""

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.criteria import Criterion
from sparsefx.errors import UnknownOption, UnseenLayer
from tests.hf_models import llama
from tests.test_sparsify_with_data import DATA, LAYERS, Net, pruned, rows


def test_layers_that_stay_dense_have_a_line() -> None:
    """So that what is asked of all of them is what the report adds up to."""
    choices = (None, sparsefx.Unstructured(0.9))
    pattern = sparsefx.Unstructured(0.5, sparsefx.Wanda())
    fast = pruned(pattern, sparsefx.Knapsack(choices, budget="parameters"))
    report = sparsefx.pruning_report(fast, "A100")
    assert len(report.layers) == 14
    assert {layer.pattern for layer in report.layers} == {"dense", "unstructured 90%"}
    assert report.totals.reached <= 0.6
    again = sparsefx.sparsify(fast, sparsefx.Recipe({LAYERS: sparsefx.NM(2, 4)}), progress=False)
    assert {layer.pattern for layer in sparsefx.pruning_report(again).layers} == {"2:4"}
    assert "the allocation leaves it dense" in str(report)


@pytest.mark.parametrize(("target", "rows"), [(3, 1), ("A100", 0), ("A100", True), ("A100", 2.5)])
def test_a_report_for_what_is_no_target_is_refused(target: object, rows: object) -> None:
    with pytest.raises(UnknownOption):
        sparsefx.pruning_report(Net(), target, rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("criterion", [sparsefx.Wanda(), sparsefx.SparseGPT()])
def test_a_layer_without_a_row_that_counts_is_named(criterion: Criterion) -> None:
    recipe = sparsefx.Recipe({"*": sparsefx.NM(2, 4, criterion)})
    with pytest.raises(UnseenLayer, match="first.weight"):
        sparsefx.sparsify(Net(), recipe, [torch.zeros(0, 16)], progress=False)
    masked = {**DATA[0], "attention_mask": torch.zeros(2, 40, dtype=torch.long)}
    with pytest.raises(UnseenLayer, match="attention_mask masks all"):
        pruned_on(masked, criterion)


def pruned_on(batch: dict[str, object], criterion: Criterion) -> nn.Module:
    recipe = sparsefx.Recipe({LAYERS: sparsefx.NM(2, 4, criterion)})
    return sparsefx.sparsify(llama().model, recipe, [batch], progress=False)


class Unused(Net):
    """A third linear, which `forward` does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(8, 8)


@pytest.mark.parametrize("criterion", [sparsefx.Magnitude(), sparsefx.Random(3)])
def test_a_data_free_layer_need_not_be_run(criterion: Criterion) -> None:
    recipe = sparsefx.Recipe(
        {"third.*": sparsefx.NM(2, 4, criterion), "*": sparsefx.NM(2, 4, sparsefx.Wanda())}
    )
    model = Unused()
    found = sparsefx.sparsify(model, recipe, [rows()], progress=False)
    lines = {layer.name: layer for layer in sparsefx.pruning_report(found).layers}
    assert lines["third.weight"].error is None and "saw no input" in lines["third.weight"].note
    assert lines["third.weight"].reached == 0.5 and lines["second.weight"].note == ""
    alone = sparsefx.sparsify(model, recipe.__class__(dict([*recipe.weights.items()][:1])))
    assert torch.equal(found.third.weight, alone.third.weight)  # type: ignore[union-attr]


def test_the_share_of_zeros_is_that_of_the_weight() -> None:
    half_dead = rows()
    half_dead[:, 8:] = 0
    recipe = sparsefx.Recipe({"first.*": sparsefx.Unstructured(0.3, sparsefx.SparseGPT())})
    found = sparsefx.sparsify(Net(), recipe, [half_dead], progress=False)
    (line,) = sparsefx.pruning_report(found).layers
    assert line.reached == float((found.first.weight == 0).float().mean()) >= 0.5
