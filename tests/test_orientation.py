"""A matrix is the layer that was asked for in one orientation only."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import sparsefx
from sparsefx.calibrate.sequential import run_blocks
from sparsefx.errors import UnobservedLayer
from sparsefx.prune.loss_gradients import squared_gradients
from sparsefx.prune.weights import prunable_weights
from tests.block_visits import Recorder, needs_of, nothing

GENERATOR = torch.Generator().manual_seed(0)
Product = Callable[[Tensor, Tensor], Tensor]

# What computes x W^T of a weight [out, in], and what computes x W.
LIKE_A_LINEAR: list[Product] = [
    F.linear,
    lambda x, w: x @ w.t(),
    lambda x, w: torch.mm(x, w.T),
    lambda x, w: x @ w.transpose(-2, -1).contiguous(),
    lambda x, w: x @ w.permute(1, 0),
    lambda x, w: torch.addmm(x.new_zeros(1), x, w.permute(-1, -2)),
    lambda x, w: F.linear(x, w.t().transpose(0, 1)),
]
TRANSPOSED: list[Product] = [
    lambda x, w: x @ w,
    lambda x, w: F.linear(x, w.t()),
    lambda x, w: torch.mm(x, w.T.transpose(0, 1)),
    lambda x, w: F.linear(x, w.permute(1, 0).detach()),
]


class Tied(nn.Module):
    """An encoder, and a product of its weight with what comes out, or none."""

    def __init__(self, layer: nn.Module, after: Product | None = None) -> None:
        super().__init__()
        self.enc, self.after = layer, after

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.enc(x))
        weight = self.enc.weight
        assert isinstance(weight, Tensor)
        return hidden if self.after is None else self.after(hidden, weight)


def gram_of(model: nn.Module, x: Tensor) -> tuple[Tensor, list[int]]:
    seen = Recorder(nothing)
    run_blocks(model, [x], needs_of(model), seen, progress=False).close()
    return seen.grams["enc.weight"], seen.counts["enc.weight"]


@pytest.mark.parametrize("width", [8, 16])  # a square weight fits either way
@pytest.mark.parametrize("number", range(len(TRANSPOSED)))
def test_a_tied_decoder_is_not_its_encoder(width: int, number: int) -> None:
    x = torch.randn(6, 16, generator=GENERATOR)
    model = Tied(nn.Linear(16, width, bias=False), TRANSPOSED[number])
    gram, counts = gram_of(model, x)
    assert counts == [6, 6]
    torch.testing.assert_close(gram, x.T @ x, rtol=1e-5, atol=1e-5)
    recipe = sparsefx.Recipe({"*": sparsefx.NM(2, 4, sparsefx.SparseGPT())})
    pruned = sparsefx.sparsify(model, recipe, [x], progress=False)
    alone = sparsefx.sparsify(Tied(model.enc), recipe, [x], progress=False)
    assert torch.equal(pruned.get_parameter("enc.weight"), alone.get_parameter("enc.weight"))
    found = squared_gradients(model, [x], prunable_weights(model))
    assert found["enc.weight"].shape == (width,)


@pytest.mark.parametrize("number", range(len(LIKE_A_LINEAR)))
def test_the_same_layer_written_otherwise_counts_again(number: int) -> None:
    x = torch.randn(6, 16, generator=GENERATOR)
    model = Tied(nn.Linear(16, 16, bias=False), LIKE_A_LINEAR[number])
    gram, counts = gram_of(model, x)
    assert counts == [12, 12]
    rows = torch.cat([x, torch.relu(model.enc(x))]).detach()
    torch.testing.assert_close(gram, rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_a_transposed_layer_reads_its_weight_as_it_is_stored() -> None:
    x = torch.randn(6, 16, generator=GENERATOR)
    for after, times in ((TRANSPOSED[0], 2), (LIKE_A_LINEAR[1], 1)):  # [in, out]: x @ w is itself
        _, counts = gram_of(Tied(Conv1D(16, 16), after), x)
        assert counts == [6 * times, 6 * times]


def test_a_layer_that_runs_only_transposed_is_unobserved() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.fc.weight

    model = Backwards()
    with pytest.raises(UnobservedLayer, match=r"fc\.weight"):
        run_blocks(model, [torch.ones(2, 16)], needs_of(model), nothing, progress=False)
