"""What a model does to itself while its graph is captured: all of it happens to a twin."""

from collections.abc import Callable
from types import MethodType

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.calibrate.given import arguments_of, captured
from sparsefx.calibrate.sequential import run_blocks
from sparsefx.prune.loss_gradients import squared_gradients
from sparsefx.prune.weights import prunable_weights
from tests.block_visits import Recorder, needs_of, nothing

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


class Root(nn.Module):
    """A layer of its own behind what a subclass does to `n`, here adding to a buffer in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.register_buffer("n", torch.ones(1))

    def count(self) -> None:
        self.n.add_(1)

    def forward(self, x: Tensor) -> Tensor:
        self.count()
        out: Tensor = self.fc(x * self.n)
        return out


class Reassigning(Root):
    def count(self) -> None:
        self.n = self.n + 1


class Caching(nn.Module):
    """Keeps a table as a plain attribute, as rope caches do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.full(x.shape[-1:], 2.0, device=x.device)
        out: Tensor = self.fc(x * self.table)
        return out


def doubled(self: Root, x: Tensor) -> Tensor:
    self.n.mul_(2)
    return self.fc(x * self.n)


def with_its_own_forward() -> Root:
    model = Root()
    model.forward = MethodType(doubled, model)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("make", [Root, Reassigning, Caching, with_its_own_forward])
def test_attributes_of_the_root(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    attributes = dict(vars(model))
    seen = Recorder(nothing)
    run_blocks(model, [X, X], needs_of(model), seen, progress=False).close()
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, each in after.items():
        assert type(each) is Tensor and torch.equal(each, before[name])
    assert vars(model).keys() == attributes.keys()
    assert all(vars(model)[name] is each for name, each in attributes.items())
    rows = 2 * torch.cat([X, X])  # each batch as the first after the model was made
    torch.testing.assert_close(seen.grams["fc.weight"], rows.T @ rows, rtol=1e-5, atol=1e-5)
    assert type(model(X)) is Tensor


@pytest.mark.parametrize("criterion", [sparsefx.Wanda(), sparsefx.SparseGPT()])
def test_a_layer_that_is_the_model(criterion: sparsefx.Wanda | sparsefx.SparseGPT) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 32)
    before = model.weight.detach().clone()
    recipe = sparsefx.Recipe({"weight": sparsefx.NM(2, 4, criterion)})
    found = sparsefx.sparsify(model, recipe, [X], progress=False)
    assert torch.equal(model.weight, before)
    assert ((found.weight.unflatten(1, (-1, 4)) != 0).sum(2) == 2).all()
    alone = nn.Sequential(model)
    inside = sparsefx.sparsify(
        alone, sparsefx.Recipe({"0.weight": sparsefx.NM(2, 4, criterion)}), [X], progress=False
    )
    assert torch.equal(found.weight, inside[0].weight)


def test_what_is_made_of_the_output_sees_the_keyword_arguments() -> None:
    model = Reassigning()
    given = arguments_of({"x": X})
    gm = captured(model, given, 0, lambda output, inputs: (output, inputs["x"]))
    outputs = gm(x=X)
    torch.testing.assert_close(outputs[0], model.fc(X * 2))
    assert torch.equal(outputs[1], X)


@pytest.mark.parametrize("inside", [False, True])
def test_a_graph_that_counts_does_not_count_in_the_model(inside: bool) -> None:
    root = Root()
    model = nn.Sequential(nn.Tanh(), root) if inside else root
    given = arguments_of(X)
    captured(model, given)(X)
    squared_gradients(model, [X, X], prunable_weights(model))
    assert type(root.n) is Tensor and root.n.tolist() == [1]
