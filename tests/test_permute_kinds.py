"""Channels that several kinds of calls read keep the function of all: every batch has its graph."""

import copy

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.graph import capture
from sparsefx.prune.permute.coupling import find_couplings

HALF = sparsefx.NM(2, 4, sparsefx.Wanda())


class Tasks(nn.Module):
    """A producer whose channels another layer reads for each task; the last keeps their order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.a, self.b = nn.Linear(32, 16), nn.Linear(32, 16)
        self.unread = nn.Linear(32, 16)

    def forward(self, x: Tensor, task: str = "a") -> Tensor:
        h = self.first(x).relu()
        if task == "sum":
            return h.cumsum(-1)
        y: Tensor = self.a(h) if task == "a" else self.b(h)
        return y


def tasks() -> tuple[Tasks, Tensor]:
    torch.manual_seed(0)
    model = Tasks().eval().double()
    return model, torch.randn(4, 16, dtype=torch.float64)


def batches(x: Tensor, *kinds: str) -> list[dict[str, object]]:
    return [{"x": x, "task": kind} for kind in kinds]


@pytest.mark.parametrize("kinds", ["ab", "ba", "aab"])
def test_what_another_kind_of_call_reads_moves_along(kinds: str) -> None:
    model, x = tasks()
    recipe = sparsefx.Recipe({"a.weight": HALF}, permute=True)
    fast = sparsefx.sparsify(model, recipe, batches(x, *kinds), progress=False)
    note = "its input channels were reordered"
    assert [each.note for each in sparsefx.pruning_report(fast).layers] == [note]
    assert not torch.equal(fast.first.weight, model.first.weight)
    # b is not pruned: its outputs are what they were, up to the order of sums.
    torch.testing.assert_close(fast(x, "b"), model(x, "b"), rtol=1e-12, atol=1e-12)
    plain = sparsefx.sparsify(
        model, sparsefx.Recipe({"a.weight": HALF}), batches(x, *kinds), progress=False
    )
    errors = [(each(x, "a") - model(x, "a")).norm() for each in (fast, plain)]
    assert errors[0] < errors[1]


def test_a_coupling_that_one_kind_of_call_pins_is_declined() -> None:
    model, x = tasks()
    recipe = sparsefx.Recipe({"a.weight": HALF}, permute=True)
    fast = sparsefx.sparsify(model, recipe, batches(x, "a", "sum"), progress=False)
    assert torch.equal(fast.first.weight, model.first.weight)
    assert "cumsum" in sparsefx.pruning_report(fast).layers[0].note
    torch.testing.assert_close(fast(x, "sum"), model(x, "sum"), rtol=0, atol=0)


def test_lengths_are_kinds_that_agree() -> None:
    model, x = tasks()
    recipe = sparsefx.Recipe({"a.weight": HALF}, permute=True)
    fast = sparsefx.sparsify(model, recipe, [x, x[:2]], progress=False)
    assert "reordered" in sparsefx.pruning_report(fast).layers[0].note
    assert not torch.equal(fast.first.weight, model.first.weight)


def test_a_weight_that_no_batch_reads_says_so_in_its_note() -> None:
    model, x = tasks()
    weights = {"a.weight": HALF, "unread.weight": sparsefx.NM(2, 4)}
    recipe = sparsefx.Recipe(weights, permute=True)
    fast = sparsefx.sparsify(copy.deepcopy(model), recipe, batches(x, "a"), progress=False)
    notes = {each.name: each.note for each in sparsefx.pruning_report(fast).layers}
    assert "no captured call reads it" in notes["unread.weight"]


def test_couplings_join_what_the_graphs_read() -> None:
    model, x = tasks()
    graphs = [capture(model, (x,), {"task": kind}) for kind in "ab"]
    alone = [find_couplings([graph], model).found for graph in graphs]
    (both,) = find_couplings(graphs, model).found
    assert [[each.name for each in found.consumers] for (found,) in alone] == [
        ["a.weight"],
        ["b.weight"],
    ]
    assert {each.name for each in both.consumers} == {"a.weight", "b.weight"}
    assert {each.name for each in both.producers} == {"first.weight", "first.bias"}
